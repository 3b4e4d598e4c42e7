// The networks over one tile, compiled for the instruction set of the including file. PYDRONE_MLP names the version,
// PYDRONE_VECTOR is its floats per vector, PYDRONE_ROWS the samples that a microkernel holds. Nothing of the standard
// library is instantiated here: the linker could use these inline functions in files compiled for less.
// With PYDRONE_BF16 the operands of products are rounded to bfloat16, with two consecutive numbers along the depth in
// the place of one float; everything else, sums included, stays in float32.
#include "exponential.h"
#include "mlp.h"

namespace pydrone {
namespace PYDRONE_MLP {

constexpr int64_t V = PYDRONE_VECTOR, kRows = PYDRONE_ROWS, kPanel = 2 * V;

typedef float Vec __attribute__((vector_size(V * 4)));
typedef int32_t Ints __attribute__((vector_size(V * 4)));
typedef float Loose __attribute__((vector_size(V * 4), aligned(4), may_alias));

#define PYDRONE_IN static inline __attribute__((always_inline))

PYDRONE_IN Vec load(const float* x) { return *reinterpret_cast<const Loose*>(x); }
PYDRONE_IN void store(float* to, Vec x) { *reinterpret_cast<Loose*>(to) = x; }
PYDRONE_IN Vec all(float x) { return x - Vec{}; }  // one broadcast; 0 + x is not x for x = -0
// NaN if either operand is.
PYDRONE_IN Vec larger(Vec a, Vec b) { return (a > b) | (a != a) ? a : b; }
PYDRONE_IN Vec smaller(Vec a, Vec b) { return (a < b) | (a != a) ? a : b; }
PYDRONE_IN float total(Vec x) {
  float sum = 0;
  for (int i = 0; i < V; ++i) sum += x[i];
  return sum;
}

}  // namespace PYDRONE_MLP
}  // namespace pydrone

#if defined(PYDRONE_BF16)
#include "mlp_bf16.h"
#endif

namespace pydrone {
namespace PYDRONE_MLP {

#if !defined(PYDRONE_BF16)
constexpr int64_t kPair = 1;  // numbers in the place of a float
PYDRONE_IN Vec multiply_add(Vec a, Vec b, Vec sum) { return sum + a * b; }
#endif

PYDRONE_IN Vec exponential(Vec x) { return clamped_exponential<float, Ints>(x); }
PYDRONE_IN Vec expm1_below_0(Vec x) {
  Vec power;
  const Vec part = reduced_expm1<float, Ints>(x < -87.0f ? all(-87.0f) : x, power);
  return part * power + (power - 1.0f);
}

// log x: for normal x = 2^n m with m in [sqrt(1/2), sqrt 2), log m = 2 atanh((m - 1) / (m + 1)).
PYDRONE_IN Vec logarithm(Vec x) {
  const Ints bits = reinterpret_cast<Ints>(x), shifted = bits - 0x3F3504F3;
  const Ints n = shifted >> 23;
  const Vec m = reinterpret_cast<Vec>(bits - (n << 23));
  const Vec s = (m - 1.0f) / (m + 1.0f), z = s * s;
  Vec p = all(2.0f / 9);
  p = p * z + 2.0f / 7;
  p = p * z + 2.0f / 5;
  p = p * z + 2.0f / 3;
  p = p * z + 2.0f;
  const Vec result = __builtin_convertvector(n, Vec) * 0.69314718f + s * p;
  const Vec special = x == 0.0f ? all(-__builtin_inff()) : (x < 0.0f ? all(__builtin_nanf("")) : x);  // inf, NaN: x
  return (x > 0.0f) & (x < __builtin_inff()) ? result : special;
}

// The activation. `slope` receives its derivative if the result does not determine it (SiLU).
template <Activation activation>
PYDRONE_IN Vec activate(Vec x, Vec& slope) {
  if constexpr (activation == kTanh) {  // tanh |x| = -e / (e + 2) with e = expm1(-2 |x|), and x's sign
    const Ints sign = reinterpret_cast<Ints>(x) & INT32_MIN;
    const Vec part = expm1_below_0(2.0f * reinterpret_cast<Vec>(reinterpret_cast<Ints>(x) | INT32_MIN));
    return reinterpret_cast<Vec>(reinterpret_cast<Ints>(-part / (part + 2.0f)) | sign);
  } else if constexpr (activation == kElu) {
    return x > 0.0f ? x : expm1_below_0(x);
  } else if constexpr (activation == kRelu) {
    return x < 0.0f ? Vec{} : x;
  } else {
    const Vec gate = 1.0f / (1.0f + exponential(-x));
    slope = gate + x * gate * (1.0f - gate);
    return x * gate;
  }
}

// The derivative, from the result y.
PYDRONE_IN Vec slope_of(int64_t activation, Vec y) {
  switch (activation) {
    case kTanh: return 1.0f - y * y;
    case kElu: return y > 0.0f ? all(1.0f) : y + 1.0f;
    default: return y > 0.0f ? all(1.0f) : Vec{};
  }
}

// What is done with a product: added to c; with bias and activation; times the activation's derivative.
enum Ending { kAdd, kLayer, kSlope };

struct Product {
  const float *a, *b;  // in bfloat16, of pairs: strides and depth count pairs
  int64_t stride;  // a's: for kAdd the stride of k, with contiguous rows; otherwise of rows, with contiguous k
  int64_t b_k;     // b[k * b_k + j]
  int64_t depth;
  float* c;
  int64_t c_row;
  const float* bias;
  float* slope;  // SiLU's derivatives, in c's layout
  int64_t activation;  // kNumActivations: none
};

// Runs after a whole panel's sums are stored: the long chains of operations of many rows overlap, and have all registers.
template <int Vectors, Activation activation>
PYDRONE_IN void activate_rows(const Product& p, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) {
      float* to = p.c + i * p.c_row + j * V;
      Vec slope = Vec{};
      store(to, activate<activation>(load(to), slope));
      if (activation == kSilu) store(p.slope + i * p.c_row + j * V, slope);
    }
}
template <int Vectors>
static void activate_panel(const Product& p, int64_t rows) {
  switch (p.activation) {
    case kTanh: return activate_rows<Vectors, kTanh>(p, rows);
    case kElu: return activate_rows<Vectors, kElu>(p, rows);
    case kRelu: return activate_rows<Vectors, kRelu>(p, rows);
    case kSilu: return activate_rows<Vectors, kSilu>(p, rows);
  }
}

// Computes c [Rows, Vectors * V] of a product, entirely in registers.
template <int Rows, int Vectors, Ending ending>
PYDRONE_IN void block(const Product& p) {
  // kAdd walks down a's columns, the others along its rows. Then every third row has its own pointer, and the two rows
  // after it are addressed by an index register.
  constexpr bool down = ending == kAdd;
  constexpr int kPointers = down ? 1 : (Rows + 2) / 3;
  Vec sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) {
      if constexpr (ending == kAdd) sum[i][j] = load(p.c + i * p.c_row + j * V);
      else if constexpr (ending == kSlope) sum[i][j] = Vec{};
      else sum[i][j] = load(p.bias + j * V);
    }
  if constexpr (ending == kAdd)  // prefetches from L2 what the next block adds to
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) __builtin_prefetch(p.c + (i + Rows) * p.c_row + j * V, 1);
  const float* a[kPointers];
  for (int i = 0; i < kPointers; ++i) a[i] = p.a + 3 * i * p.stride;
  const float* b = p.b;
  const int64_t stride = p.stride;
  for (int64_t k = 0; k < p.depth; ++k, b += p.b_k) {
    Vec right[Vectors];
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) right[j] = load(b + j * V);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec left = all(down ? a[0][i] : a[i / 3][i % 3 * stride]);
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) sum[i][j] = multiply_add(left, right[j], sum[i][j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kPointers; ++i) a[i] += down ? stride : 1;
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) {
      float* to = p.c + i * p.c_row + j * V;
      if constexpr (ending == kSlope) {
        const Vec slope = p.slope ? load(p.slope + i * p.c_row + j * V) : slope_of(p.activation, load(to));
        sum[i][j] *= slope;
      }
      store(to, sum[i][j]);
    }
}

// Splits the rows into `count` blocks as evenly as can be: sums of fewer rows would wait for one another's additions.
template <int Rows, int Vectors, Ending ending>
PYDRONE_IN void blocks(Product p, int64_t rows, int64_t count) {
  for (; rows > (Rows - 1) * count; rows -= Rows, --count) {
    block<Rows, Vectors, ending>(p);
    p.a += Rows * (ending == kAdd ? 1 : p.stride);
    p.c += Rows * p.c_row;
    if (p.slope) p.slope += Rows * p.c_row;
  }
  if constexpr (Rows > 1) blocks<Rows - 1, Vectors, ending>(p, rows, count);
}

template <int Vectors, Ending ending>
static void column(const Product& p, int64_t rows) {
  // At least eight independent sums hide the latency of additions, at two a cycle.
  constexpr int kMost = Vectors * kRows < 8 ? 2 * kRows : kRows;
  blocks<kMost, Vectors, ending>(p, rows, (rows + kMost - 1) / kMost);
  if constexpr (ending == kLayer) activate_panel<Vectors>(p, rows);
}

// c [rows, columns] = a b, columns a multiple of V; if `packed`, b consists of consecutive panels.
template <Ending ending>
static void product(Product p, int64_t rows, int64_t columns, bool packed) {
  for (int64_t j = 0; j < columns;) {
    const int64_t width = columns - j >= kPanel ? kPanel : V;
    if (packed) p.b_k = width;
    if (width == kPanel) column<2, ending>(p, rows);
    else column<1, ending>(p, rows);
    p.b += packed ? p.depth * width : width;
    p.c += width;
    if (p.bias) p.bias += width;
    if (p.slope) p.slope += width;
    j += width;
  }
}

// The number of float places that `depth` numbers take.
PYDRONE_IN int64_t places(int64_t depth) { return (depth + kPair - 1) / kPair; }

// Packs panels of columns of a [depth, columns] matrix with elements (k, j) = from[k * row + j * step]; zero for
// j >= valid.
static void pack_panels(float* to, const float* from, int64_t depth, int64_t columns, int64_t valid, int64_t row,
                        int64_t step) {
  for (int64_t j0 = 0; j0 < columns;) {
    const int64_t width = columns - j0 >= kPanel ? kPanel : V;
    for (int64_t k = 0; k < depth; k += kPair)
      for (int64_t j = j0; j < j0 + width; ++j) {
        const float x = j < valid ? from[k * row + j * step] : 0.0f;
#if defined(PYDRONE_BF16)
        const float next = j < valid && k + 1 < depth ? from[(k + 1) * row + j * step] : 0.0f;
        *to++ = pair(x, next);
#else
        *to++ = x;
#endif
      }
    j0 += width;
  }
}

static void pack(const MlpLayer& layer, bool backward) {
  pack_panels(layer.forward, layer.weight, layer.in, layer.out_padded, layer.out, 1, layer.in);
  float* bias = layer.forward + places(layer.in) * layer.out_padded;
  for (int64_t j = 0; j < layer.out_padded; ++j) bias[j] = j < layer.out ? layer.bias[j] : 0.0f;
  if (backward) pack_panels(layer.backward, layer.weight, layer.out, layer.in_padded, layer.in, layer.in, 1);
}

// Floats between the rounded pairs of consecutive samples, in whole cache lines.
PYDRONE_IN int64_t column_ld(int64_t ld) { return kPair == 2 ? (ld / 2 + 15) / 16 * 16 : ld; }

// A tile's numbers [kTile, ld] in the thread's memory, and their form as an operand of products.
struct Numbers {
  const float* x;
  int64_t ld;
  float* rounded;  // layout of mlp_bf16.h's round

  void round(int64_t rows, int64_t width) const {
#if defined(PYDRONE_BF16)
    PYDRONE_MLP::round(x, ld, rows, width, rounded, by_column_ld());
#endif
  }
  // The operand with depth over the columns, and with depth over the samples.
  const float* by_column() const { return kPair == 2 ? rounded : x; }
  int64_t by_column_ld() const { return column_ld(ld); }
  const float* by_sample() const { return kPair == 2 ? rounded + kTile * by_column_ld() : x; }
};

// The memory of one network: [its rounded input], then for each layer outputs, [SiLU's derivatives], [the rounded
// outputs, later the rounded gradients with respect to them].
static int64_t rounded_size(int64_t ld) { return kPair == 2 ? kTile * column_ld(ld) + kTile / 2 * ld : 0; }
static int64_t slopes_size(const MlpNet& net, int64_t ld) { return net.activation == kSilu ? kTile * ld : 0; }
static int64_t size_of(const MlpNet& net, const MlpLayer& layer) {
  return kTile * layer.ld + slopes_size(net, layer.ld) + rounded_size(layer.ld);
}
static int64_t work_size(const MlpNet& net, int64_t ld) {
  int64_t size = rounded_size(ld);
  for (int64_t l = 0; l < net.num_layers; ++l) size += size_of(net, net.layers[l]);
  return size;
}
PYDRONE_IN Numbers outputs_at(const MlpNet& net, const MlpLayer& layer, float* work) {
  return {work, layer.ld, work + kTile * layer.ld + slopes_size(net, layer.ld)};
}

static const float* forward(const MlpNet& net, const float* x, int64_t ld, int64_t count, float* work) {
  Numbers input{x, ld, work};
  work += rounded_size(ld);
  for (int64_t l = 0; l < net.num_layers; ++l) {
    const MlpLayer& layer = net.layers[l];
    const bool hidden = l + 1 < net.num_layers;
    input.round(count, layer.in);
    Product p{input.by_column(), layer.forward, input.by_column_ld(), 0, places(layer.in), work, layer.ld,
              layer.forward + places(layer.in) * layer.out_padded,
              hidden && net.activation == kSilu ? work + kTile * layer.ld : nullptr,
              hidden ? net.activation : kNumActivations};
    product<kLayer>(p, count, layer.out_padded, true);
    input = outputs_at(net, layer, work);
    work += size_of(net, layer);
  }
  return input.x;
}

// Adds the gradients of a tile. The last layer's outputs have been replaced by the loss's gradients with respect to
// them. On the way down, every other layer's outputs are replaced by those with respect to its activation's input.
static void backward(const MlpNet& net, const float* x, int64_t ld, int64_t count, float* work, float* grads) {
  float* outputs[64];
  const Numbers seen{x, ld, work};
  work += rounded_size(ld);
  for (int64_t l = 0; l < net.num_layers; ++l) {
    outputs[l] = work;
    work += size_of(net, net.layers[l]);
  }
  for (int64_t l = net.num_layers - 1; l >= 0; --l) {
    const MlpLayer& layer = net.layers[l];
    const Numbers input = l ? outputs_at(net, net.layers[l - 1], outputs[l - 1]) : seen;
    const Numbers grad = outputs_at(net, layer, outputs[l]);
    grad.round(count, layer.out);
    float* bias = grads + layer.bias_grad;
    for (int64_t j = 0; j < layer.out_padded; j += V) {
      Vec sum = load(bias + j), other = Vec{};
      for (int64_t n = 0; n < count; n += 2) {  // count is even
        sum += load(outputs[l] + n * layer.ld + j);
        other += load(outputs[l] + (n + 1) * layer.ld + j);
      }
      store(bias + j, sum + other);
    }
    // The gradient of W^T, [in, out]: the number of rows is the number of inputs, rarely a multiple of kRows.
    product<kAdd>({input.by_sample(), grad.by_sample(), input.ld, layer.ld, places(count), grads + layer.weight_grad,
                   layer.out_padded, nullptr, nullptr, 0},
                  layer.in, layer.out_padded, false);
    if (l == 0) continue;
    product<kSlope>({grad.by_column(), layer.backward, grad.by_column_ld(), 0, places(layer.out), outputs[l - 1],
                     input.ld, nullptr, net.activation == kSilu ? outputs[l - 1] + kTile * input.ld : nullptr,
                     net.activation},
                    count, layer.in_padded, true);
  }
}

// ------------------------------------------------------------------------------------------------------- the loss

// The formulas are those of pydrone/ppo/learner/loss.py and pydrone/ppo/policy/distributions.py. Metrics are sums here,
// and gradients are scaled by `share`.

PYDRONE_IN Ints samples(int64_t n, int64_t count) {
  Ints index;
  for (int i = 0; i < V; ++i) index[i] = static_cast<int32_t>(n) + i;
  return index < static_cast<int32_t>(count);
}

// The surrogate of samples n to n + V, with what depends on their ratio alone.
struct Surrogate {
  Vec surrogate = Vec{}, approx_kl = Vec{}, outside = Vec{};

  // Returns the loss's gradient with respect to the log-probabilities.
  inline __attribute__((always_inline)) Vec add(const PpoLoss& loss, const PpoTile& tile, int64_t n, Vec log_probs) {
    const Ints exists = samples(n, tile.count);
    const Vec log_ratio = log_probs - load(tile.log_probs + n), ratio = exponential(log_ratio);
    const Vec advantage = load(tile.advantages + n);
    const Vec kept = larger(smaller(ratio, all(1 + loss.clip)), all(1 - loss.clip));
    const Vec plain = ratio * advantage, clipped = kept * advantage;
    // As torch differentiates minimum and clamp: the unclipped term's gradient, unless the clipped term is smaller.
    const Vec grad = plain <= clipped ? plain : (plain != plain ? plain : Vec{});
    const Vec smallest = plain <= clipped ? plain : (clipped < plain ? clipped : plain + clipped);
    const Vec moved = ratio - 1.0f;
    surrogate += exists ? smallest : Vec{};
    approx_kl += exists ? moved - log_ratio : Vec{};
    outside += exists & ((moved > loss.clip) | (moved < -loss.clip)) ? all(1.0f) : Vec{};
    return exists ? grad * -loss.share : Vec{};
  }
  void write(const PpoTile& tile) const {
    tile.sums[kSurrogate] -= total(surrogate);
    tile.sums[kApproxKl] += total(approx_kl);
    tile.sums[kClipFraction] += total(outside);
  }
};

// Zeroes what lies beyond the outputs, and the outputs of rows without samples.
static void clear_beyond(const PpoTile& tile, float* outputs, int64_t ld, int64_t width) {
  for (int64_t n = 0; n < kTile; ++n)
    for (int64_t j = n < tile.count ? width : 0; j < ld; ++j) outputs[n * ld + j] = 0;
}

// Replaces `outputs` [kTile, ld], the means, by the loss's gradients with respect to them.
static void gaussian_loss(const PpoLoss& loss, const PpoTile& tile, float* outputs, int64_t ld) {
  float ratio_grad[kTile];
  Surrogate sums;
  Vec divergence = Vec{};
  float lacking = 0;  // minus the log-density at the mean
  for (int64_t j = 0; j < loss.num_actions; ++j) {
    const Vec s = all(loss.std[j]);
    lacking += logarithm(s)[0] + 0.918938533f;
  }
  for (int64_t n = 0; n < kTile; n += V) {
    Vec squares = Vec{}, apart_from_old = Vec{};
    for (int64_t j = 0; j < loss.num_actions; ++j) {
      Vec mean;
      for (int i = 0; i < V; ++i) mean[i] = outputs[(n + i) * ld + j];
      const Vec z = (load(tile.actions + j * kTile + n) - mean) / loss.std[j];
      squares += z * z;
      if (loss.kl) {
        const Vec apart = load(tile.mu + j * kTile + n) - mean, old = load(tile.sigma + j * kTile + n);
        const float s = loss.std[j];
        // Exactly 0 if nothing has changed. With old * old - s * s, an FMA would round only one of the squares.
        const Vec wider = (old - s) * (old + s);
        apart_from_old += (apart * apart + wider) * (0.5f / (s * s)) + (logarithm(all(s)) - logarithm(old));
      }
    }
    store(ratio_grad + n, sums.add(loss, tile, n, -0.5f * squares - lacking));
    divergence += samples(n, tile.count) ? apart_from_old : Vec{};
  }
  for (int64_t j = 0; j < loss.num_actions; ++j) {
    const float inverse = 1.0f / loss.std[j];
    float std_grad = 0;
    for (int64_t n = 0; n < tile.count; ++n) {
      const float z = (tile.actions[j * kTile + n] - outputs[n * ld + j]) * inverse;
      outputs[n * ld + j] = ratio_grad[n] * z * inverse;
      std_grad += ratio_grad[n] * (z * z - 1.0f) * inverse;
    }
    tile.std_grad[j] += std_grad;
  }
  clear_beyond(tile, outputs, ld, loss.num_actions);
  sums.write(tile);
  tile.sums[kKl] += total(divergence);
}

// As gaussian_loss, of discrete actions: `outputs` are the logits of each action's choices, one action after the other.
static void categorical_loss(const PpoLoss& loss, const PpoTile& tile, float* outputs, int64_t ld) {
  Surrogate sums;
  Vec entropies = Vec{};
  int64_t width = 0;
  for (int64_t h = 0; h < loss.num_actions; ++h) width += loss.categories[h];
  for (int64_t n = 0; n < kTile; n += V) {
    float* const rows = outputs + n * ld;
    auto logits = [&](int64_t j) {
      Vec x;
      for (int i = 0; i < V; ++i) x[i] = rows[i * ld + j];
      return x;
    };
    auto replace = [&](int64_t j, Vec x) {
      for (int i = 0; i < V; ++i) rows[i * ld + j] = x[i];
    };
    Vec log_probs = Vec{};
    for (int64_t h = 0, first = 0; h < loss.num_actions; first += loss.categories[h++]) {
      const int64_t end = first + loss.categories[h];
      Vec most = logits(first), sum = Vec{}, chosen = all(__builtin_nanf(""));  // where the action is no choice
      for (int64_t j = first + 1; j < end; ++j) most = larger(most, logits(j));
      for (int64_t j = first; j < end; ++j) sum += exponential(logits(j) - most);
      const Vec normalizer = most + logarithm(sum), action = load(tile.actions + h * kTile + n);
      for (int64_t j = first; j < end; ++j) {
        const Vec x = logits(j) - normalizer;
        chosen = action == static_cast<float>(j - first) ? x : chosen;
        replace(j, x);
      }
      log_probs += chosen;
    }
    const Vec ratio_grad = sums.add(loss, tile, n, log_probs);
    const Ints exists = samples(n, tile.count);
    for (int64_t h = 0, first = 0; h < loss.num_actions; first += loss.categories[h++]) {
      const int64_t end = first + loss.categories[h];
      Vec entropy = Vec{};
      // 0 log 0 is 0: exponential() never returns 0, and log-probabilities are finite where logits are.
      for (int64_t j = first; j < end; ++j) entropy -= exponential(logits(j)) * logits(j);
      const Vec action = load(tile.actions + h * kTile + n);
      for (int64_t j = first; j < end; ++j) {
        const Vec x = logits(j), p = exponential(x);
        const Vec hit = action == static_cast<float>(j - first) ? all(1.0f) : Vec{};
        const Vec grad = ratio_grad * (hit - p) + (loss.entropy_coef * loss.share) * p * (x + entropy);
        replace(j, exists ? grad : Vec{});
      }
      entropies += exists ? entropy : Vec{};
    }
  }
  clear_beyond(tile, outputs, ld, width);
  sums.write(tile);
  tile.sums[kEntropy] += total(entropies);
}

static void critic_loss(const PpoLoss& loss, const PpoTile& tile, float* outputs, int64_t ld) {
  Vec sum = Vec{};
  float grads[kTile];
  for (int64_t n = 0; n < kTile; n += V) {
    Vec value;
    for (int i = 0; i < V; ++i) value[i] = outputs[(n + i) * ld];
    const Vec target = load(tile.returns + n), error = value - target;
    Vec square = error * error, grad = 2.0f * error;
    if (loss.value_clip >= 0) {
      const Vec old = load(tile.values + n), moved = value - old;
      const Vec held = larger(smaller(moved, all(loss.value_clip)), all(-loss.value_clip));
      const Vec other = held + (old - target), squared = other * other;
      const Vec held_grad = moved == held ? 2.0f * other : Vec{};
      grad = !loss.value_max ? held_grad : squared > square ? held_grad : grad;
      square = loss.value_max ? larger(square, squared) : squared;
    }
    sum += samples(n, tile.count) ? square : Vec{};
    store(grads + n, grad * (loss.share * loss.value_coef));
  }
  for (int64_t n = 0; n < kTile; ++n) {
    outputs[n * ld] = n < tile.count ? grads[n] : 0.0f;
    for (int64_t j = 1; j < ld; ++j) outputs[n * ld + j] = 0;
  }
  tile.sums[kValueLoss] += total(sum);
}

// Zeroes the outputs of the tile's rows without samples.
static void clear(float* outputs, int64_t ld, int64_t from) {
  for (int64_t i = from * ld; i < kTile * ld; ++i) outputs[i] = 0;
}

static void step(const MlpNet& actor, const MlpNet& critic, const PpoLoss& loss, const PpoTile& tile) {
  // Whole pairs of samples; inputs beyond `count` are zero, and so are their gradients.
  const int64_t rows = (tile.count + 1) / 2 * 2;
  auto* outputs = const_cast<float*>(forward(actor, tile.actor_obs, tile.actor_ld, rows, tile.work));
  clear(outputs, actor.layers[actor.num_layers - 1].ld, tile.count);
  const auto actor_loss = loss.std ? gaussian_loss : categorical_loss;
  actor_loss(loss, tile, outputs, actor.layers[actor.num_layers - 1].ld);
  backward(actor, tile.actor_obs, tile.actor_ld, rows, tile.work, tile.grads);
  outputs = const_cast<float*>(forward(critic, tile.critic_obs, tile.critic_ld, rows, tile.work));
  clear(outputs, critic.layers[critic.num_layers - 1].ld, tile.count);
  critic_loss(loss, tile, outputs, critic.layers[critic.num_layers - 1].ld);
  backward(critic, tile.critic_obs, tile.critic_ld, rows, tile.work, tile.grads);
}

}  // namespace PYDRONE_MLP
}  // namespace pydrone
