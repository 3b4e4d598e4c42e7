// GAE on the CPU: rows of environments at a time, backwards through the steps, the carry in L1.
//
// Time-major planes of the computation's own type are read and written where they lie. Anything else (row-major
// callers, other dtypes, separate flags) goes through tiles of kTileSteps x kTileEnvs, small enough for L1.
#include "../recurrence.h"
#include "common.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace pydrone {
namespace {

constexpr int64_t kRowEnvs = 1024;  // most environments of a direct block: carry, row and outputs fit L1
constexpr int64_t kTileEnvs = 128;
constexpr int64_t kTileSteps = 16;

// A logical [N, C] argument, strides in bytes.
struct Plane {
  char* data = nullptr;
  int64_t env = 0;
  int64_t step = 0;
  ScalarType type = ScalarType::Float;

  Plane() = default;
  explicit Plane(const Tensor& x)
      : data(static_cast<char*>(x.data_ptr())),
        env(x.stride(0) * static_cast<int64_t>(x.element_size())),
        step(x.dim() > 1 ? x.stride(1) * static_cast<int64_t>(x.element_size()) : 0),
        type(x.scalar_type()) {}

  char* at(int64_t n, int64_t t) const { return data + n * env + t * step; }
  bool direct(ScalarType wanted, int64_t size) const { return type == wanted && env == size; }
};

struct Job {
  Plane rewards, values, dones, truncated, valid, last_values, final_values, final_rows, advantages, returns;
  bool has_truncated, has_valid, has_pool, has_returns, has_stats, coded, streaming;
  int64_t num_envs, num_steps, capacity, start, pool_size, bootstrap, block;
  double gamma, gamma_lam;
  double* partials;  // [blocks, 3]
};

// dst[t * ld + n] = f(src(n, t)); the inner loop runs along whichever of the source's dimensions is dense.
template <class To, class From, class F>
inline void read_tile(To* dst, int64_t ld, const Plane& src, int64_t n0, int64_t envs, int64_t t0, int64_t steps,
                      const F& f) {
  if (src.env <= src.step || steps == 1) {
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t n = 0; n < envs; ++n)
        dst[t * ld + n] = f(*reinterpret_cast<const From*>(src.at(n0 + n, t0 + t)));
  } else {
    for (int64_t n = 0; n < envs; ++n)
      for (int64_t t = 0; t < steps; ++t)
        dst[t * ld + n] = f(*reinterpret_cast<const From*>(src.at(n0 + n, t0 + t)));
  }
}

template <class T>
void read_reals(const char* name, T* dst, int64_t ld, const Plane& src, int64_t n0, int64_t envs, int64_t t0,
                int64_t steps) {
  for_real(name, src.type, [&](auto kind) {
    using From = decltype(kind);
    read_tile<T, From>(dst, ld, src, n0, envs, t0, steps, [](From x) { return convert<T>(x); });
  });
}

void read_flags(const char* name, uint8_t* dst, int64_t ld, const Plane& src, int64_t n0, int64_t envs, int64_t t0,
                int64_t steps) {
  for_flag(name, src.type, [&](auto kind) {
    using From = decltype(kind);
    read_tile<uint8_t, From>(dst, ld, src, n0, envs, t0, steps, [](From x) -> uint8_t { return nonzero(x); });
  });
}

template <class T>
void write_tile(const Plane& dst, const T* src, int64_t ld, int64_t n0, int64_t envs, int64_t t0, int64_t steps) {
  if (dst.env <= dst.step) {
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t n = 0; n < envs; ++n) *reinterpret_cast<T*>(dst.at(n0 + n, t0 + t)) = src[t * ld + n];
  } else {
    for (int64_t n = 0; n < envs; ++n)
      for (int64_t t = 0; t < steps; ++t) *reinterpret_cast<T*>(dst.at(n0 + n, t0 + t)) = src[t * ld + n];
  }
}

template <class T>
struct Moments {
  T count, mean, m2;
};

// GCC does not turn the selects of a plain loop into vector code (it threads jumps through them first), so the loops
// are written in its vector types, 64 bytes wide; it breaks them up to what the instruction set has.
template <class T>
struct Vector;
#if defined(__GNUC__)
template <>
struct Vector<float> {
  typedef float Real __attribute__((vector_size(64)));
  typedef int32_t Code __attribute__((vector_size(64)));
  typedef uint8_t Byte __attribute__((vector_size(16)));
  static constexpr int64_t kSize = 16;
};
template <>
struct Vector<double> {
  typedef double Real __attribute__((vector_size(64)));
  typedef int64_t Code __attribute__((vector_size(64)));
  typedef uint8_t Byte __attribute__((vector_size(8)));
  static constexpr int64_t kSize = 8;
};

template <class V>
PYDRONE_INLINE V load(const void* from) {
  V x;
  std::memcpy(&x, from, sizeof(V));
  return x;
}

template <class T>
PYDRONE_INLINE typename Vector<T>::Code load_codes(const uint8_t* codes) {
  return __builtin_convertvector(load<typename Vector<T>::Byte>(codes), typename Vector<T>::Code);
}
#endif

// One step of a block of environments: carry becomes this step's advantages.
template <class T>
PYDRONE_INLINE void step_body(T* carry, T* returns, const T* rewards, const T* values, const T* next,
                              const T* at_truncation, const uint8_t* codes, int64_t n, T gamma, T gamma_lam) {
  int64_t i = 0;
#if defined(__GNUC__)
  using V = typename Vector<T>::Real;
  for (; i + Vector<T>::kSize <= n; i += Vector<T>::kSize) {
    const V value = load<V>(values + i);
    const V advantage = gae_step(load_codes<T>(codes + i), load<V>(rewards + i), value, load<V>(next + i),
                                 load<V>(at_truncation + i), gamma, gamma_lam, load<V>(carry + i));
    const V sum = advantage + value;
    std::memcpy(carry + i, &advantage, sizeof(V));
    std::memcpy(returns + i, &sum, sizeof(V));
  }
#endif
  for (; i < n; ++i) {
    carry[i] = gae_step(int32_t{codes[i]}, rewards[i], values[i], next[i], at_truncation[i], gamma, gamma_lam, carry[i]);
    returns[i] = carry[i] + values[i];
  }
}

// Chan, Golub and LeVeque 1979, eq. 2.1: (count, mean, M2) of two disjoint samples, joined.
inline void merge(double* into, double count, double mean, double m2) {
  const double total = into[0] + count;
  if (total == 0) return;
  const double difference = mean - into[1];
  into[1] += difference * count / total;
  into[2] += m2 + difference * difference * into[0] * count / total;
  into[0] = total;
}

// Joins the moments of a row of samples to `into`, in two passes over L1. The sums run in lanes whose number does not
// depend on the instruction set, so that neither does the result.
template <class T>
PYDRONE_INLINE void moments_body(double* into, const T* x, int64_t n) {
  int64_t i = 0;
#if defined(__GNUC__)
  using V = typename Vector<T>::Real;
  constexpr int64_t kSize = Vector<T>::kSize;
  V sum{}, square{};
  for (; i + kSize <= n; i += kSize) sum += load<V>(x + i);
  double all = 0, m2 = 0;
  for (int64_t j = 0; j < kSize; ++j) all += sum[j];
  const double mean = i ? all / static_cast<double>(i) : 0;
  const T rounded = static_cast<T>(mean);
  for (int64_t k = 0; k < i; k += kSize) {
    const V difference = load<V>(x + k) - rounded;
    square += difference * difference;
  }
  for (int64_t j = 0; j < kSize; ++j) m2 += square[j];
  // M2 about the mean, from that about the rounded mean.
  const double off = mean - rounded;
  merge(into, static_cast<double>(i), mean, std::max(0.0, m2 - static_cast<double>(i) * off * off));
#endif
  for (; i < n; ++i) merge(into, 1, x[i], 0);
}

#define PYDRONE_INSTANCE(T)                                                                                       \
  PYDRONE_CLONES void step(T* carry, T* returns, const T* rewards, const T* values, const T* next,                \
                           const T* at_truncation, const uint8_t* codes, int64_t n, T gamma, T gamma_lam) {       \
    step_body(carry, returns, rewards, values, next, at_truncation, codes, n, gamma, gamma_lam);                  \
  }                                                                                                               \
  PYDRONE_CLONES void moments(double* into, const T* x, int64_t n) { moments_body(into, x, n); }
PYDRONE_INSTANCE(float)
PYDRONE_INSTANCE(double)
#undef PYDRONE_INSTANCE

template <class T>
void run_block(const Job& job, int64_t block) {
  constexpr ScalarType kType = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
  const int64_t n0 = block * job.block;
  const int64_t envs = std::min(job.block, job.num_envs - n0);
  const T gamma = static_cast<T>(job.gamma), gamma_lam = static_cast<T>(job.gamma_lam);

  const bool direct_rewards = job.rewards.direct(kType, sizeof(T));
  const bool direct_values = job.values.direct(kType, sizeof(T));
  const bool direct_codes = job.coded && job.dones.env == 1;
  const bool direct_advantages = job.advantages.direct(kType, sizeof(T));
  const bool direct_returns = job.has_returns && job.returns.direct(kType, sizeof(T));

  // Rows that live through the whole block, then tiles; one block's worth, reused by the thread.
  alignas(64) T carry[kRowEnvs], next[kRowEnvs], returns_row[kRowEnvs], spare[kRowEnvs];
  alignas(64) T rewards_tile[kTileSteps * kTileEnvs], values_tile[kTileSteps * kTileEnvs];
  alignas(64) T advantages_tile[kTileSteps * kTileEnvs], returns_tile[kTileSteps * kTileEnvs];
  alignas(64) uint8_t codes_tile[kTileSteps * kTileEnvs], flags_tile[kTileSteps * kTileEnvs];

  std::fill(carry, carry + envs, T{0});
  read_reals<T>("last_values", next, 0, job.last_values, n0, envs, 0, 1);
  const T* next_row = next;
  double* partial = job.partials ? job.partials + 3 * block : nullptr;
  if (partial) partial[0] = partial[1] = partial[2] = 0;

  int64_t end = job.num_steps;
  while (end > 0) {
    // Steps [begin, end) lie at slots in a row: a chunk never crosses the end of the ring.
    const int64_t last_slot = (job.start + end - 1) % job.capacity;
    const int64_t steps = std::min({end, kTileSteps, last_slot + 1});
    const int64_t begin = end - steps;
    const int64_t slot0 = last_slot - steps + 1;
    if (!direct_rewards) read_reals<T>("rewards", rewards_tile, kTileEnvs, job.rewards, n0, envs, slot0, steps);
    // The row after this chunk's last one is the previous chunk's first, in a tile about to be overwritten.
    if (!direct_values) {
      if (next_row != next) std::copy(next_row, next_row + envs, next);
      next_row = next;
      read_reals<T>("values", values_tile, kTileEnvs, job.values, n0, envs, slot0, steps);
    }
    if (!direct_codes) {
      if (job.coded) {
        read_tile<uint8_t, uint8_t>(codes_tile, kTileEnvs, job.dones, n0, envs, slot0, steps,
                                    [](uint8_t x) { return x; });
      } else {
        read_flags("dones", codes_tile, kTileEnvs, job.dones, n0, envs, slot0, steps);
        if (job.has_truncated) {
          read_flags("truncated", flags_tile, kTileEnvs, job.truncated, n0, envs, slot0, steps);
          for (int64_t i = 0; i < steps * kTileEnvs; ++i)
            codes_tile[i] = flags_tile[i] ? uint8_t{kTruncated} : codes_tile[i];
        }
        if (job.has_valid) {
          read_flags("valid", flags_tile, kTileEnvs, job.valid, n0, envs, slot0, steps);
          for (int64_t i = 0; i < steps * kTileEnvs; ++i)
            codes_tile[i] = flags_tile[i] ? codes_tile[i] : uint8_t{kInvalid};
        }
      }
    }
    for (int64_t i = steps - 1; i >= 0; --i) {
      const int64_t slot = slot0 + i, t = begin + i;
      const T* rewards = direct_rewards ? reinterpret_cast<const T*>(job.rewards.at(n0, slot))
                                        : rewards_tile + i * kTileEnvs;
      const T* values = direct_values ? reinterpret_cast<const T*>(job.values.at(n0, slot)) : values_tile + i * kTileEnvs;
      const uint8_t* codes = direct_codes ? reinterpret_cast<const uint8_t*>(job.dones.at(n0, slot))
                                          : codes_tile + i * kTileEnvs;
      const T* at_truncation = job.bootstrap == 2 ? values : next_row;
      if (job.bootstrap == 1 && std::memchr(codes, kTruncated, envs)) {
        std::copy(next_row, next_row + envs, spare);
        for (int64_t n = 0; n < envs; ++n) {
          if (codes[n] != kTruncated) continue;
          if (job.has_pool) {
            const int64_t row = *reinterpret_cast<const int32_t*>(job.final_rows.at(n0 + n, slot));
            if (row < 0 || row >= job.pool_size)
              spare[n] = std::numeric_limits<T>::quiet_NaN();
            else
              read_reals<T>("final_values", spare + n, 0, job.final_values, row, 1, 0, 1);
          } else {
            read_reals<T>("final_values", spare + n, 0, job.final_values, n0 + n, 1, slot, 1);
          }
        }
        at_truncation = spare;
      }
      T* returns = direct_returns || !job.has_returns ? returns_row : returns_tile + i * kTileEnvs;
      step(carry, returns, rewards, values, next_row, at_truncation, codes, envs, gamma, gamma_lam);
      if (partial) {
        if (!std::memchr(codes, kInvalid, envs)) {
          moments(partial, carry, envs);
        } else {
          int64_t kept = 0;
          for (int64_t n = 0; n < envs; ++n) {
            spare[kept] = carry[n];
            kept += codes[n] != kInvalid;
          }
          moments(partial, spare, kept);
        }
      }
      if (direct_advantages)
        put(job.advantages.at(n0, t), carry, envs * sizeof(T), job.streaming);
      else
        std::copy(carry, carry + envs, advantages_tile + i * kTileEnvs);
      if (direct_returns) put(job.returns.at(n0, t), returns, envs * sizeof(T), job.streaming);
      next_row = values;
    }
    if (!direct_advantages) write_tile(job.advantages, advantages_tile, kTileEnvs, n0, envs, begin, steps);
    if (job.has_returns && !direct_returns)
      write_tile(job.returns, returns_tile, kTileEnvs, n0, envs, begin, steps);
    end = begin;
  }
  if (job.streaming) stream_fence();
}

// Blocks depend on the sizes alone, never on the number of threads: the statistics are bit-equal from run to run.
int64_t block_size(const Job& job, ScalarType type, int64_t size) {
  const bool direct = job.rewards.direct(type, size) && job.values.direct(type, size) && job.coded &&
                      job.dones.env == 1 && job.advantages.direct(type, size) &&
                      (!job.has_returns || job.returns.direct(type, size));
  const int64_t quarter = (job.num_envs / 4 + 63) / 64 * 64;
  return std::clamp<int64_t>(quarter, 64, direct ? kRowEnvs : kTileEnvs);
}

}  // namespace

void gae(const Tensor& rewards, const Tensor& values, const Tensor& dones, const Optional& truncated,
         const Optional& valid, const Tensor& last_values, const Optional& final_values, const Optional& final_rows,
         double gamma, double lam, int64_t start, bool coded, int64_t bootstrap, const Optional& cursor,
         const Tensor& advantages, const Optional& returns, const Optional& stats, const Optional& workspace) {
  check_shape("rewards", rewards, {-1, -1});
  const int64_t num_envs = rewards.size(0), capacity = rewards.size(1);
  check_shape("advantages", advantages, {num_envs, -1});
  const int64_t num_steps = advantages.size(1);
  STD_TORCH_CHECK(num_steps <= capacity, "advantages: expected at most ", capacity, " steps, got ", num_steps);
  check_shape("values", values, {num_envs, capacity});
  check_shape("dones", dones, {num_envs, capacity});
  check_scalars("last_values", last_values, num_envs);
  check_real("rewards", rewards);
  check_real("values", values);
  check_real("last_values", last_values);
  check_device("values", values, rewards);
  check_device("dones", dones, rewards);
  check_device("last_values", last_values, rewards);
  check_device("advantages", advantages, rewards);
  if (coded) check_dtype("dones", dones, ScalarType::Byte);
  check_flags("dones", dones);
  for (const auto& [name, flags] : {std::pair{"truncated", &truncated}, {"valid", &valid}}) {
    if (!flags->has_value()) continue;
    check_shape(name, **flags, {num_envs, capacity});
    check_flags(name, **flags);
    check_device(name, **flags, rewards);
  }
  check_range("bootstrap", bootstrap, 0, 4);
  if (bootstrap == 1) {
    STD_TORCH_CHECK(final_values.has_value(), "final_values: expected a tensor with bootstrap 1, got None");
    check_real("final_values", *final_values);
    check_device("final_values", *final_values, rewards);
    if (final_rows) check_device("final_rows", *final_rows, rewards);
    if (final_rows) {
      check_shape("final_values", *final_values, {-1});
      check_shape("final_rows", *final_rows, {num_envs, capacity});
      check_dtype("final_rows", *final_rows, ScalarType::Int);
    } else {
      check_shape("final_values", *final_values, {num_envs, capacity});
    }
  }
  const ScalarType type = advantages.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "advantages: expected dtype Float or Double, got ", torch::headeronly::toString(type));
  if (returns) {
    check_shape("returns", *returns, {num_envs, num_steps});
    check_dtype("returns", *returns, type);
    check_device("returns", *returns, rewards);
  }
  if (stats) {
    check_shape("stats", *stats, {3});
    check_dtype("stats", *stats, ScalarType::Double);
    check_contiguous("stats", *stats);
    check_device("stats", *stats, rewards);
    STD_TORCH_CHECK(workspace.has_value(), "workspace: expected a tensor with stats, got None");
    check_dtype("workspace", *workspace, ScalarType::Double);
    check_contiguous("workspace", *workspace);
    check_device("workspace", *workspace, rewards);
    STD_TORCH_CHECK(workspace->numel() >= 3 * ((num_envs + 3) / 4) + 1, "workspace: expected at least ",
                    3 * ((num_envs + 3) / 4) + 1, " elements, got ", workspace->numel());
  }
  if (cursor) {
    check_cursor(cursor, rewards);
    if (capacity) start = static_cast<const int64_t*>(cursor->data_ptr())[1] % capacity;
  }
  if (num_steps) check_range("start", start, 0, capacity);

  Job job{};
  job.rewards = Plane(rewards);
  job.values = Plane(values);
  job.dones = Plane(dones);
  job.last_values = Plane(last_values);
  job.advantages = Plane(advantages);
  if ((job.has_truncated = truncated.has_value())) job.truncated = Plane(*truncated);
  if ((job.has_valid = valid.has_value())) job.valid = Plane(*valid);
  if (bootstrap == 1) job.final_values = Plane(*final_values);
  if ((job.has_pool = bootstrap == 1 && final_rows.has_value())) {
    job.final_rows = Plane(*final_rows);
    job.pool_size = final_values->size(0);
  }
  if ((job.has_returns = returns.has_value())) job.returns = Plane(*returns);
  job.coded = coded;
  job.num_envs = num_envs;
  job.num_steps = num_steps;
  job.capacity = capacity;
  job.start = start;
  job.bootstrap = bootstrap;
  job.gamma = gamma;
  job.gamma_lam = gamma * lam;
  // Element 0 of the workspace is the GPU backends' ticket.
  job.partials = stats ? static_cast<double*>(workspace->data_ptr()) + 1 : nullptr;
  const int64_t size = type == ScalarType::Float ? 4 : 8;
  job.streaming = num_envs * num_steps * size >= kStreamBytes;
  job.block = block_size(job, type, size);

  const int64_t blocks = num_steps ? (num_envs + job.block - 1) / job.block : 0;
  // A fork costs some microseconds: about 64 Ki samples a thread make up for it.
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, job.block * num_steps));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block)
      type == ScalarType::Float ? run_block<float>(job, block) : run_block<double>(job, block);
  });
  if (stats) {
    double total[3] = {};
    for (int64_t block = 0; block < blocks; ++block)
      merge(total, job.partials[3 * block], job.partials[3 * block + 1], job.partials[3 * block + 2]);
    std::copy(total, total + 3, static_cast<double*>(stats->data_ptr()));
  }
}

}  // namespace pydrone
