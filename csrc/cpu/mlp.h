// Multilayer perceptrons and PPO's loss over a tile of samples: the interface between networks.h and the versions of
// mlp_tile.h. Plain structs and pointers: each version is compiled for its own instruction set and must not share
// inline code with the others.
#pragma once

#include <cstdint>

namespace pydrone {

constexpr int64_t kTile = 128;  // samples that go through the networks at a time; their activations stay in L2

enum Activation : int64_t { kTanh, kElu, kRelu, kSilu, kNumActivations };

// y = act(W x + b), W [out, in] as torch has it.
struct MlpLayer {
  const float *weight, *bias;
  int64_t in, out;
  int64_t in_padded, out_padded;   // rounded up to whole vectors of the version
  float *forward, *backward;       // packed weights: panels of columns of W^T, and of W
  int64_t weight_grad, bias_grad;  // offsets in a thread's gradients; W's are transposed, [in, out_padded]
  int64_t ld;                      // floats between the outputs of consecutive samples
};

struct MlpNet {
  MlpLayer* layers;
  int64_t num_layers;
  int64_t activation;
};

struct PpoLoss {
  const float* std;  // [num_actions]; null: actions are discrete
  int64_t num_actions;
  const int64_t* categories;  // [num_actions], the choices of each discrete action
  float clip, value_clip;     // value_clip below 0: no value clipping
  bool value_max;             // the greater of the clipped and the plain error, not the clipped one alone
  float value_coef, entropy_coef;
  float share;  // 1 / samples of the minibatch
  bool kl;
};

enum Metric : int64_t { kSurrogate, kValueLoss, kEntropy, kKl, kApproxKl, kClipFraction, kNumMetrics };

// One tile in a thread's memory. Arrays over samples are [..., kTile], zero beyond `count`.
struct PpoTile {
  int64_t count;                    // samples
  float *actor_obs, *critic_obs;    // [kTile, ld]; the same pointer if both networks have the same input
  int64_t actor_ld, critic_ld;
  float *actions, *mu, *sigma;      // [num_actions, kTile]
  float *log_probs, *advantages, *returns, *values;  // [kTile]
  float* work;                      // outputs of every layer of the larger network, and their rounded copies
  float* grads;                     // this thread's sums
  float* std_grad;                  // [num_actions], of the log-probabilities alone
  double* sums;                     // [kNumMetrics]; a Gaussian's entropy, the same for every sample, is left out
};

struct MlpVersion {
  const char* name;
  int64_t vector;  // floats
  // Floats of `work` that a network takes; `ld`: floats between samples of its input.
  int64_t (*work_size)(const MlpNet&, int64_t ld);
  void (*pack)(const MlpLayer&, bool backward);
  void (*step)(const MlpNet& actor, const MlpNet& critic, const PpoLoss&, const PpoTile&);
  // Outputs of the last layer, [kTile, ld]; `x` as actor_obs.
  const float* (*forward)(const MlpNet&, const float* x, int64_t ld, int64_t count, float* work);
};

// The best version for this processor, or a lesser one chosen by PYDRONE_ISA, for tests and comparisons.
const MlpVersion& version();
// The version that multiplies in bfloat16; null if the processor has no AVX512_BF16 or PYDRONE_ISA chooses less.
const MlpVersion* bf16_version();

extern const MlpVersion kMlpBase;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PYDRONE_MLP_VERSIONS
extern const MlpVersion kMlpV3, kMlpV4, kMlpBf16;
#endif

}  // namespace pydrone
