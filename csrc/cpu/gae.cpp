// GAE on the CPU: a block of environments at a time, backwards through the steps, with the carry in L1.
//
// Time-major planes of the computation's dtype are read and written in place, and flags become codes one row at a time.
// Any other plane (env-major, another dtype) goes through tiles.
#include "../recurrence.h"
#include "../scan.h"
#include "tiles.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace pydrone {
namespace {

constexpr int64_t kRowEnvs = 1024;  // largest direct block, in environments: carry, row and outputs fit L1
constexpr int64_t kAhead = 2;       // rows prefetched

struct Job {
  Plane rewards, values, dones, truncated, valid, last_values, final_values, final_rows, advantages, returns;
  bool has_truncated, has_valid, has_pool, has_returns, coded, streaming;
  int64_t num_envs, num_steps, capacity, start, pool_size, bootstrap, block, blocks;
  double gamma, gamma_lam;
  double* partials;  // [blocks, 3]
};

constexpr int64_t kLanes = 16;  // of the sums; the same on every instruction set, so that results do not depend on it

#if defined(__GNUC__)
// GCC does not vectorise the selects of a plain loop (jump threading turns them into branches first), so the loops use
// its vector types, as wide as the instruction set's.
template <class T, int Bytes>
struct Vector {
  static constexpr int64_t kSize = Bytes / sizeof(T), kParts = kLanes / kSize;  // elements; vectors to hold the lanes
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Real __attribute__((vector_size(Bytes)));
  typedef Integer Code __attribute__((vector_size(Bytes)));
  typedef uint8_t Byte __attribute__((vector_size(Bytes / sizeof(T))));
  typedef uint16_t Wider __attribute__((vector_size(2 * Bytes / sizeof(T))));
};

template <class V>
PYDRONE_INLINE V load(const void* from) {
  V x;
  std::memcpy(&x, from, sizeof(V));
  return x;
}

// Widened in two steps: GCC 12 would split a single step into scalar elements.
template <class V>
PYDRONE_INLINE typename V::Code load_codes(const uint8_t* codes) {
#if defined(__SSE2__)
  if constexpr (sizeof(typename V::Byte) == 4 && sizeof(typename V::Code) == 16) {  // and these even so
    const __m128i none = _mm_setzero_si128();
    const __m128i bytes = _mm_cvtsi32_si128(load<int32_t>(codes));
    return reinterpret_cast<typename V::Code>(_mm_unpacklo_epi16(_mm_unpacklo_epi8(bytes, none), none));
  }
#endif
  const auto wider = __builtin_convertvector(load<typename V::Byte>(codes), typename V::Wider);
  return __builtin_convertvector(wider, typename V::Code);
}
#endif

// Sums over a row of advantages minus a pivot, and of their squares, in lanes.
template <class T>
struct Sums {
  alignas(64) T first[kLanes], second[kLanes];
};

#if defined(__GNUC__)
// A store that bypasses the cache where the processor has one; `to` is 16-byte aligned.
template <class V>
PYDRONE_INLINE void stream_vector(void* to, V x) {
#if defined(__SSE2__)
  __m128i parts[sizeof(V) / 16];
  std::memcpy(parts, &x, sizeof(V));
  for (size_t i = 0; i < sizeof(V) / 16; ++i) _mm_stream_si128(static_cast<__m128i*>(to) + i, parts[i]);
#else
  std::memcpy(to, &x, sizeof(V));
#endif
}
#endif

// One step of a block of environments. `after`: the next step's advantages; `advantages`: this step's, possibly the
// same memory. Stream: advantages also go to `advantages_out`; that copy and `returns` are written past the cache.
template <int Bytes, bool Stream, class T>
PYDRONE_INLINE void step_body(const T* after, T* advantages, T* advantages_out, T* returns, Sums<T>& sums, T pivot,
                              const T* rewards, const T* values, const T* next, const T* at_truncation,
                              const uint8_t* codes, int64_t n, T gamma, T gamma_lam) {
  std::fill(sums.first, sums.first + kLanes, T{0});
  std::fill(sums.second, sums.second + kLanes, T{0});
  int64_t i = 0;
#if defined(__GNUC__)
  using Kind = Vector<T, Bytes>;
  using V = typename Kind::Real;
  V first[Kind::kParts] = {}, second[Kind::kParts] = {};
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t part = 0; part < Kind::kParts; ++part) {
      const int64_t k = i + part * Kind::kSize;
      const V value = load<V>(values + k);
      const V advantage = gae_step(load_codes<Kind>(codes + k), load<V>(rewards + k), value, load<V>(next + k),
                                   load<V>(at_truncation + k), gamma, gamma_lam, load<V>(after + k));
      const V sum = advantage + value, difference = advantage - pivot;
      first[part] += difference;
      second[part] += difference * difference;
      std::memcpy(advantages + k, &advantage, sizeof(V));
      if constexpr (Stream) {
        stream_vector(advantages_out + k, advantage);
        stream_vector(returns + k, sum);
      } else {
        std::memcpy(returns + k, &sum, sizeof(V));
      }
    }
  std::memcpy(sums.first, first, sizeof(first));
  std::memcpy(sums.second, second, sizeof(second));
#endif
  for (; i < n; ++i) {
    const T advantage = gae_step(int32_t{codes[i]}, rewards[i], values[i], next[i], at_truncation[i], gamma, gamma_lam,
                                 after[i]);
    const T difference = advantage - pivot;
    advantages[i] = advantage;
    if constexpr (Stream) advantages_out[i] = advantage;
    returns[i] = advantage + values[i];
    sums.first[i % kLanes] += difference;
    sums.second[i % kLanes] += difference * difference;
  }
}

// Merges (count, mean, M2) of two disjoint samples: Chan, Golub and LeVeque 1979, eq. 2.1.
inline void merge(double* into, double count, double mean, double m2) {
  const double total = into[0] + count;
  if (total == 0) return;
  const double difference = mean - into[1];
  into[1] += difference * count / total;
  into[2] += m2 + difference * difference * into[0] * count / total;
  into[0] = total;
}

// Merges the moments of a row of samples into `into`, in two passes over L1.
template <int Bytes, class T>
PYDRONE_INLINE void moments_body(double* into, const T* x, int64_t n) {
  int64_t i = 0;
#if defined(__GNUC__)
  using Kind = Vector<T, Bytes>;
  using V = typename Kind::Real;
  V sum[Kind::kParts] = {}, square[Kind::kParts] = {};
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t part = 0; part < Kind::kParts; ++part) sum[part] += load<V>(x + i + part * Kind::kSize);
  double all = 0, m2 = 0;
  for (int64_t j = 0; j < kLanes; ++j) all += sum[j / Kind::kSize][j % Kind::kSize];
  const double mean = i ? all / static_cast<double>(i) : 0;
  const T rounded = static_cast<T>(mean);
  for (int64_t k = 0; k < i; k += kLanes)
    for (int64_t part = 0; part < Kind::kParts; ++part) {
      const V difference = load<V>(x + k + part * Kind::kSize) - rounded;
      square[part] += difference * difference;
    }
  for (int64_t j = 0; j < kLanes; ++j) m2 += square[j / Kind::kSize][j % Kind::kSize];
  // Corrects M2 from the rounded mean to the mean.
  const double off = mean - rounded;
  m2 -= static_cast<double>(i) * off * off;
  merge(into, static_cast<double>(i), mean, m2 < 0 ? 0 : m2);  // not std::max, which drops a NaN
#endif
  for (; i < n; ++i) merge(into, 1, x[i], 0);
}

#define PYDRONE_STEP(name, stream, T)                                                                                  \
  template <int Bytes>                                                                                                 \
  PYDRONE_INLINE void name##_body(const T* after, T* advantages, T* advantages_out, T* returns, Sums<T>& sums,         \
                                  T pivot, const T* rewards, const T* values, const T* next, const T* at_truncation,   \
                                  const uint8_t* codes, int64_t n, T gamma, T gamma_lam) {                             \
    step_body<Bytes, stream>(after, advantages, advantages_out, returns, sums, pivot, rewards, values, next,           \
                             at_truncation, codes, n, gamma, gamma_lam);                                               \
  }                                                                                                                    \
  PYDRONE_VERSIONED(void, name, name##_body,                                                                           \
                    (const T* after, T* advantages, T* advantages_out, T* returns, Sums<T>& sums, T pivot,             \
                     const T* rewards, const T* values, const T* next, const T* at_truncation, const uint8_t* codes,   \
                     int64_t n, T gamma, T gamma_lam),                                                                 \
                    (after, advantages, advantages_out, returns, sums, pivot, rewards, values, next, at_truncation,    \
                     codes, n, gamma, gamma_lam))
#define PYDRONE_INSTANCE(T)                \
  PYDRONE_STEP(step, false, T)             \
  PYDRONE_STEP(step_streaming, true, T)    \
  PYDRONE_VERSIONED(void, moments, moments_body, (double* into, const T* x, int64_t n), (into, x, n))
PYDRONE_INSTANCE(float)
PYDRONE_INSTANCE(double)
#undef PYDRONE_INSTANCE
#undef PYDRONE_STEP

// Merges a row's moments into `into` from its sums about `pivot`, and returns the next row's pivot: this row's mean. If
// the mean is so far from the pivot that the subtraction would lose digits, two passes are made instead.
template <class T>
T join_sums(double* into, const Sums<T>& sums, T pivot, const T* row, int64_t n) {
  double first = 0, second = 0;
  for (int64_t j = 0; j < kLanes; ++j) first += sums.first[j], second += sums.second[j];
  const double count = static_cast<double>(n), off = first / count, m2 = second - first * off;
  if (m2 >= 0.25 * second)
    merge(into, count, pivot + off, m2);
  else
    moments(into, row, n);
  const T mean = static_cast<T>(pivot + off);
  return std::isfinite(mean) ? mean : T{0};
}

// The codes of a row from its flags (bytes, set if nonzero; null: no such flag). The highest code takes precedence.
template <int>
PYDRONE_INLINE void encode_row_body(uint8_t* codes, const uint8_t* dones, const uint8_t* truncated, const uint8_t* valid,
                               int64_t n) {
  for (int64_t i = 0; i < n; ++i) codes[i] = dones[i] ? uint8_t{kTerminated} : uint8_t{kRunning};
  if (truncated)
    for (int64_t i = 0; i < n; ++i) codes[i] = std::max(codes[i], truncated[i] ? uint8_t{kTruncated} : uint8_t{0});
  if (valid)
    for (int64_t i = 0; i < n; ++i) codes[i] = std::max(codes[i], valid[i] ? uint8_t{0} : uint8_t{kInvalid});
}
PYDRONE_VERSIONED(void, encode_row, encode_row_body,
                  (uint8_t* codes, const uint8_t* dones, const uint8_t* truncated, const uint8_t* valid, int64_t n),
                  (codes, dones, truncated, valid, n))

// Which planes are used in place; the others are read or written in tiles.
template <class T>
struct Direct {
  bool rewards, values, dones, truncated, valid, advantages, returns, all;

  explicit Direct(const Job& job) {
    auto is = [](const Plane& x) { return x.direct(kTypeOf<T>, sizeof(T)); };
    auto is_flag = [](const Plane& x) { return x.env == 1; };  // contiguous bytes
    rewards = is(job.rewards), values = is(job.values), advantages = is(job.advantages);
    returns = !job.has_returns || is(job.returns);
    dones = is_flag(job.dones);
    truncated = !job.has_truncated || is_flag(job.truncated);
    valid = !job.has_valid || is_flag(job.valid);
    all = rewards && values && dones && truncated && valid && advantages && returns;
  }
};

// Processes a block of environments from the last step to the first, and holds the memory for it; one per thread.
template <class T>
class Block {
 public:
  Block(const Job& job, int64_t block)
      : job_(job), direct_(job), n0_(block * job.block), envs_(std::min(job.block, job.num_envs - n0_)) {
    if (job.partials) partial_ = job.partials + 3 * block;
    if (partial_) partial_[0] = partial_[1] = partial_[2] = 0;
    std::fill(advantages_row_, advantages_row_ + envs_, T{0});
    read_reals<T>("last_values", next_row_, 0, job.last_values, n0_, envs_, 0, 1);
    after_ = advantages_row_;
    next_ = next_row_;
  }

  void run() {
    for (int64_t end = job_.num_steps; end > 0;) {
      // Steps [end - steps, end) lie in consecutive slots: a chunk never crosses the end of the ring.
      const int64_t last_slot = (job_.start + end - 1) % job_.capacity;
      const int64_t steps = std::min({end, kTileSteps, last_slot + 1});
      end -= steps;
      read_chunk(last_slot - steps + 1, steps);
      for (int64_t i = steps - 1; i >= 0; --i) run_step(i, last_slot - steps + 1 + i, end + i);
      if (!direct_.advantages) write_tile(job_.advantages, advantages_tile_, kTileEnvs, n0_, envs_, end, steps);
      if (!direct_.returns) write_tile(job_.returns, returns_tile_, kTileEnvs, n0_, envs_, end, steps);
    }
    if (job_.streaming) stream_fence();
  }

 private:
  // A row is too short for the hardware prefetcher, which would notice it too late.
  void fetch_row(const Plane& plane, int64_t slot) const {
    if (slot >= kAhead) fetch(plane.at(n0_, slot - kAhead), envs_ * plane.env);
  }

  void fetch_chunk(const Plane& plane, int64_t slot, int64_t bytes) const {
    if (slot >= kTileSteps && plane.step == bytes)
      for (int64_t n = 0; n < envs_; ++n) fetch(plane.at(n0_ + n, slot - kTileSteps), kTileSteps * bytes);
  }

  void read_chunk(int64_t slot, int64_t steps) {
    if (!direct_.rewards) {
      fetch_chunk(job_.rewards, slot, sizeof(T));
      read_reals<T>("rewards", rewards_tile_, kTileEnvs, job_.rewards, n0_, envs_, slot, steps);
    }
    if (!direct_.values) {
      // The values after this chunk's last step are the previous chunk's first row, in a tile about to be overwritten.
      if (next_ != next_row_) std::copy(next_, next_ + envs_, next_row_);
      next_ = next_row_;
      fetch_chunk(job_.values, slot, sizeof(T));
      read_reals<T>("values", values_tile_, kTileEnvs, job_.values, n0_, envs_, slot, steps);
    }
    if (!direct_.dones) {
      if (job_.coded)
        read_bytes(dones_tile_, kTileEnvs, job_.dones, n0_, envs_, slot, steps);
      else
        read_flags("dones", dones_tile_, kTileEnvs, job_.dones, n0_, envs_, slot, steps);
    }
    if (!direct_.truncated)
      read_flags("truncated", truncated_tile_, kTileEnvs, job_.truncated, n0_, envs_, slot, steps);
    if (!direct_.valid) read_flags("valid", valid_tile_, kTileEnvs, job_.valid, n0_, envs_, slot, steps);
  }

  template <class E>
  E* row(bool direct, const Plane& plane, int64_t position, E* tile, int64_t i) const {
    return direct ? reinterpret_cast<E*>(plane.at(n0_, position)) : tile + i * kTileEnvs;
  }

  const uint8_t* codes_of(int64_t i, int64_t slot) {
    const uint8_t* dones = row(direct_.dones, job_.dones, slot, dones_tile_, i);
    if (direct_.dones) fetch_row(job_.dones, slot);
    if (job_.coded) return dones;
    const uint8_t* truncated = job_.has_truncated ? row(direct_.truncated, job_.truncated, slot, truncated_tile_, i) : nullptr;
    const uint8_t* valid = job_.has_valid ? row(direct_.valid, job_.valid, slot, valid_tile_, i) : nullptr;
    encode_row(codes_row_, dones, truncated, valid, envs_);
    return codes_row_;
  }

  // V of the true final observations where truncated; unspecified elsewhere.
  const T* final_values(const uint8_t* codes, int64_t slot) {
    if (!std::memchr(codes, kTruncated, envs_)) return next_;
    std::copy(next_, next_ + envs_, spare_row_);
    for (int64_t n = 0; n < envs_; ++n) {
      if (codes[n] != kTruncated) continue;
      if (!job_.has_pool) {
        read_reals<T>("final_values", spare_row_ + n, 0, job_.final_values, n0_ + n, 1, slot, 1);
        continue;
      }
      const int64_t row = *reinterpret_cast<const int32_t*>(job_.final_rows.at(n0_ + n, slot));
      if (row < 0 || row >= job_.pool_size)
        spare_row_[n] = std::numeric_limits<T>::quiet_NaN();
      else
        read_reals<T>("final_values", spare_row_ + n, 0, job_.final_values, row, 1, 0, 1);
    }
    return spare_row_;
  }

  void run_step(int64_t i, int64_t slot, int64_t t) {
    const T* rewards = row(direct_.rewards, job_.rewards, slot, rewards_tile_, i);
    const T* values = row(direct_.values, job_.values, slot, values_tile_, i);
    if (direct_.rewards) fetch_row(job_.rewards, slot);
    if (direct_.values) fetch_row(job_.values, slot);
    const uint8_t* codes = codes_of(i, slot);
    const T* at_truncation =
        job_.bootstrap == kStoredValue ? values : (job_.bootstrap == kFinalValues ? final_values(codes, slot) : next_);
    T* advantages = row(direct_.advantages, job_.advantages, t, advantages_tile_, i);
    T* returns = job_.has_returns ? row(direct_.returns, job_.returns, t, returns_tile_, i) : returns_row_;
    const T gamma = static_cast<T>(job_.gamma), gamma_lam = static_cast<T>(job_.gamma_lam);
    if (job_.streaming && aligned(advantages) && aligned(returns)) {
      step_streaming(after_, advantages_row_, advantages, returns, sums_, pivot_, rewards, values, next_, at_truncation,
                     codes, envs_, gamma, gamma_lam);
      after_ = advantages_row_;
    } else {
      step(after_, advantages, nullptr, returns, sums_, pivot_, rewards, values, next_, at_truncation, codes, envs_,
           gamma, gamma_lam);
      after_ = advantages;
    }
    next_ = values;
    if (!partial_) return;
    if (!std::memchr(codes, kInvalid, envs_)) {
      pivot_ = join_sums(partial_, sums_, pivot_, after_, envs_);
    } else {
      int64_t kept = 0;
      for (int64_t n = 0; n < envs_; ++n) {
        spare_row_[kept] = after_[n];
        kept += codes[n] != kInvalid;
      }
      moments(partial_, spare_row_, kept);
    }
  }

  static bool aligned(const T* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; }

  const Job& job_;
  const Direct<T> direct_;
  const int64_t n0_, envs_;
  double* partial_ = nullptr;
  const T *after_, *next_;  // A and V of the next step
  T pivot_{0};
  Sums<T> sums_;
  alignas(64) T advantages_row_[kRowEnvs], next_row_[kRowEnvs], returns_row_[kRowEnvs], spare_row_[kRowEnvs];
  alignas(64) uint8_t codes_row_[kRowEnvs];
  static constexpr int64_t kTile = kTileSteps * kTileEnvs;
  alignas(64) T rewards_tile_[kTile], values_tile_[kTile], advantages_tile_[kTile], returns_tile_[kTile];
  alignas(64) uint8_t dones_tile_[kTile], truncated_tile_[kTile], valid_tile_[kTile];
};

// The block size depends on the problem size only, not on the number of threads: statistics are bit-equal across runs.
int64_t block_size(const Job& job, bool direct) {
  const int64_t quarter = (job.num_envs / 4 + 63) / 64 * 64;
  return std::clamp<int64_t>(quarter, 64, direct ? kRowEnvs : kTileEnvs);
}

template <class T>
void run(Job& job) {
  const Direct<T> direct(job);
  job.block = block_size(job, direct.all);
  // Tiles are read again right after they are written; direct rows are not.
  job.streaming = direct.all && job.num_envs * job.num_steps * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
  job.blocks = job.num_steps ? (job.num_envs + job.block - 1) / job.block : 0;
  // Waking a sleeping thread costs up to 0.1 ms; 256 Ki samples, 0.1 to 0.15 ms of work, make up for it.
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 18) / std::max<int64_t>(1, job.block * job.num_steps));
  torch::stable::parallel_for(0, job.blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) Block<T>(job, block).run();
  });
}

}  // namespace

void gae(const Tensor& rewards, const Tensor& values, const Tensor& dones, const Optional& truncated,
         const Optional& valid, const Tensor& last_values, const Optional& final_values, const Optional& final_rows,
         double gamma, double lam, int64_t start, bool coded, int64_t bootstrap, const Optional& cursor,
         const Tensor& advantages, const Optional& returns, const Optional& stats, const Optional& workspace) {
  check_gae(rewards, values, dones, truncated, valid, last_values, final_values, final_rows, coded, bootstrap, cursor,
            advantages, returns, stats, workspace);
  const int64_t num_envs = rewards.size(0), capacity = rewards.size(1), num_steps = advantages.size(1);
  if (cursor && capacity) start = static_cast<const int64_t*>(cursor->data_ptr())[1] % capacity;
  if (num_steps) check_range("start", start, 0, capacity);

  Job job{};
  job.rewards = Plane(rewards);
  job.values = Plane(values);
  job.dones = Plane(dones);
  job.last_values = Plane(last_values);
  job.advantages = Plane(advantages);
  if ((job.has_truncated = truncated.has_value())) job.truncated = Plane(*truncated);
  if ((job.has_valid = valid.has_value())) job.valid = Plane(*valid);
  if (bootstrap == kFinalValues) job.final_values = Plane(*final_values);
  if ((job.has_pool = bootstrap == kFinalValues && final_rows.has_value())) {
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
  // Element 0 of the workspace holds the ticket of the GPU backends.
  job.partials = stats ? static_cast<double*>(workspace->data_ptr()) + 1 : nullptr;
  advantages.scalar_type() == ScalarType::Float ? run<float>(job) : run<double>(job);
  if (stats) {
    double total[3] = {};
    for (int64_t block = 0; block < job.blocks; ++block)
      merge(total, job.partials[3 * block], job.partials[3 * block + 1], job.partials[3 * block + 2]);
    std::copy(total, total + 3, static_cast<double*>(stats->data_ptr()));
  }
}

void off_policy(const Tensor&, const Tensor&, const Tensor&, const Optional&,
                const Optional&, const Tensor&, const Optional&,
                const Optional&, const Tensor&, const Optional&, double, double,
                double, double, int64_t, bool, int64_t, const Optional&,
                const Optional&, const Tensor&, const Optional&, const Optional&) {
  STD_TORCH_CHECK(false, "off_policy: not implemented on the CPU yet");
}

}  // namespace pydrone
