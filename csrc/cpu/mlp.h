// Multilayer perceptrons and PPO's loss over a tile of samples: what networks.h hands to the versions of mlp_tile.h.
// Plain structs and pointers: each version is compiled for its own instructions, and shares no inline code with others.
#pragma once

#include <cstdint>

namespace pydrone {

constexpr int64_t kTile = 128;  // samples that go through the networks at a time, their activations staying in L2

enum Activation : int64_t { kTanh, kElu, kRelu, kSilu, kNumActivations };

// y = act(W x + b), W [out, in] as torch has it.
struct MlpLayer {
  const float *weight, *bias;
  int64_t in, out;
  int64_t in_padded, out_padded;   // multiples of the version's vector
  float *forward, *backward;       // packed weights: panels of columns of W^T, and of W
  int64_t weight_grad, bias_grad;  // where they begin among a thread's gradients: W's transposed, [in, out_padded]
  int64_t ld;                      // floats from one sample's outputs to the next's
};

struct MlpNet {
  MlpLayer* layers;
  int64_t num_layers;
  int64_t activation;
};

struct PpoLoss {
  const float* std;  // [num_actions]
  int64_t num_actions;
  float clip, value_clip;  // value_clip below 0: none
  float value_coef;
  float share;  // 1 / samples of the minibatch
  bool kl;
};

// One tile in a thread's memory. Arrays of samples are [.., kTile], zero where there is no sample.
struct PpoTile {
  int64_t count;                    // samples
  float *actor_obs, *critic_obs;    // [kTile, ld]; the same where both see the same
  int64_t actor_ld, critic_ld;
  float *actions, *mu, *sigma;      // [num_actions, kTile]
  float *log_probs, *advantages, *returns, *values;  // [kTile]
  float* work;                      // outputs of every layer of the larger network, and what they are rounded to
  float* grads;                     // this thread's sums
  float* std_grad;                  // [num_actions], of the log-probabilities alone
  double* sums;                     // surrogate, value loss, KL
};

struct MlpVersion {
  const char* name;
  int64_t vector;  // floats
  // Floats of `work` that a network takes, its input from one sample to the next being `ld`.
  int64_t (*work_size)(const MlpNet&, int64_t ld);
  void (*pack)(const MlpLayer&, bool backward);
  void (*step)(const MlpNet& actor, const MlpNet& critic, const PpoLoss&, const PpoTile&);
  // Outputs of the last layer, [kTile, ld]; `x` as actor_obs.
  const float* (*forward)(const MlpNet&, const float* x, int64_t ld, int64_t count, float* work);
};

// The best that the processor has, or a lesser one by PYDRONE_ISA, for tests and comparisons.
const MlpVersion& version();
// The one that multiplies in bfloat16; null where the processor has no AVX512_BF16, or PYDRONE_ISA names less.
const MlpVersion* bf16_version();

extern const MlpVersion kMlpBase;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PYDRONE_MLP_VERSIONS
extern const MlpVersion kMlpV3, kMlpV4, kMlpBf16;
#endif

}  // namespace pydrone
