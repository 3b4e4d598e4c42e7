// GAE, V-trace and Retrace on the CPU: a block of environments at a time, backwards through the steps, with the carry
// in L1.
//
// Time-major planes of the computation's dtype are read and written in place, and flags become codes one row at a time.
// Any other plane (env-major, another dtype) goes through tiles.
#include "../scan.h"
#include "scan_step.h"
#include "tiles.h"

namespace pydrone {
namespace {

constexpr int64_t kRowEnvs = 1024;  // largest direct block, in environments: carry, row and outputs fit L1
constexpr int64_t kAhead = 2;       // rows prefetched

struct Job {
  Estimator estimator;
  Plane rewards, values, dones, truncated, valid, last_values, final_values, final_rows, log_rhos, q_values;
  Plane advantages, targets;  // targets: GAE's are the returns
  bool has_truncated, has_valid, has_pool, has_advantages, has_targets, coded, streaming;
  int64_t num_envs, num_steps, capacity, start, pool_size, bootstrap, block, blocks;
  double gamma, decay, rho_clip, c_clip;
  double* partials;  // [blocks, 3]
};

// Which planes are used in place; the others are read or written in tiles.
template <class T>
struct Direct {
  bool rewards, values, dones, truncated, valid, log_rhos, q_values, advantages, targets, all;

  explicit Direct(const Job& job) {
    auto is = [](const Plane& x) { return x.direct(kTypeOf<T>, sizeof(T)); };
    auto is_flag = [](const Plane& x) { return x.env == 1; };  // contiguous bytes
    rewards = is(job.rewards), values = is(job.values);
    log_rhos = job.estimator == Estimator::kGae || is(job.log_rhos);
    q_values = job.estimator != Estimator::kRetrace || is(job.q_values);
    advantages = !job.has_advantages || is(job.advantages);
    targets = !job.has_targets || is(job.targets);
    dones = is_flag(job.dones);
    truncated = !job.has_truncated || is_flag(job.truncated);
    valid = !job.has_valid || is_flag(job.valid);
    all = rewards && values && dones && truncated && valid && log_rhos && q_values && advantages && targets;
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
    std::fill(carry_row_, carry_row_ + envs_, T{0});
    factors_ = {static_cast<T>(job.gamma), static_cast<T>(job.decay), static_cast<T>(job.rho_clip),
                static_cast<T>(job.c_clip)};
    read_reals<T>("last_values", next_row_, 0, job.last_values, n0_, envs_, 0, 1);
    row_.after = carry_row_;
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
      if (!direct_.targets) write_tile(job_.targets, targets_tile_, kTileEnvs, n0_, envs_, end, steps);
    }
    if (job_.streaming) stream_fence();
  }

 private:
  void fetch_row(const Plane& plane, int64_t slot) const {
    if (slot >= kAhead) fetch(plane.at(n0_, slot - kAhead), envs_ * plane.env);
  }

  void fetch_chunk(const Plane& plane, int64_t slot, int64_t bytes) const {
    if (slot >= kTileSteps && plane.step == bytes)
      for (int64_t n = 0; n < envs_; ++n) fetch(plane.at(n0_ + n, slot - kTileSteps), kTileSteps * bytes);
  }

  void read_chunk(int64_t slot, int64_t steps) {
    auto read = [&](const char* name, bool direct, const Plane& plane, T* tile) {
      if (direct) return;
      fetch_chunk(plane, slot, sizeof(T));
      read_reals<T>(name, tile, kTileEnvs, plane, n0_, envs_, slot, steps);
    };
    read("rewards", direct_.rewards, job_.rewards, rewards_tile_);
    read("log_rhos", direct_.log_rhos, job_.log_rhos, log_rhos_tile_);
    read("q_values", direct_.q_values, job_.q_values, q_values_tile_);
    if (!direct_.values) {
      // The values after this chunk's last step are the previous chunk's first row, in a tile about to be overwritten.
      if (next_ != next_row_) std::copy(next_, next_ + envs_, next_row_);
      next_ = next_row_;
    }
    read("values", direct_.values, job_.values, values_tile_);
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
  E* at(bool direct, const Plane& plane, int64_t position, E* tile, int64_t i) const {
    return direct ? reinterpret_cast<E*>(plane.at(n0_, position)) : tile + i * kTileEnvs;
  }

  const uint8_t* codes_of(int64_t i, int64_t slot) {
    const uint8_t* dones = at(direct_.dones, job_.dones, slot, dones_tile_, i);
    if (direct_.dones) fetch_row(job_.dones, slot);
    if (job_.coded) return dones;
    const uint8_t* truncated = job_.has_truncated ? at(direct_.truncated, job_.truncated, slot, truncated_tile_, i) : nullptr;
    const uint8_t* valid = job_.has_valid ? at(direct_.valid, job_.valid, slot, valid_tile_, i) : nullptr;
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

  // A step's row of a plane, and in `ahead` the one to prefetch while it is computed: the hardware prefetcher would notice
  // it too late. A streamed step fetches it in between, any other here.
  const T* reals_of(bool direct, const Plane& plane, int64_t slot, T* tile, int64_t i, bool streamed, const T*& ahead) {
    const T* const found = ahead = at(direct, plane, slot, tile, i);
    if (!direct || slot < kAhead) return found;
    if (streamed)
      ahead = reinterpret_cast<const T*>(plane.at(n0_, slot - kAhead));
    else
      fetch_row(plane, slot);
    return found;
  }

  void run_step(int64_t i, int64_t slot, int64_t t) {
    Row<T>& row = row_;
    row.targets = job_.has_targets ? at(direct_.targets, job_.targets, t, targets_tile_, i) : targets_row_;
    row.advantages = row.advantages_out = advantages_row_;
    if (job_.has_advantages) row.advantages_out = at(direct_.advantages, job_.advantages, t, advantages_tile_, i);
    const bool streamed = job_.streaming && aligned(row.advantages_out) && aligned(row.targets);
    if (!streamed) row.advantages = row.advantages_out;
    row.rewards = reals_of(direct_.rewards, job_.rewards, slot, rewards_tile_, i, streamed, row.rewards_ahead);
    row.values = reals_of(direct_.values, job_.values, slot, values_tile_, i, streamed, row.values_ahead);
    if (job_.estimator != Estimator::kGae)
      row.log_rhos = reals_of(direct_.log_rhos, job_.log_rhos, slot, log_rhos_tile_, i, streamed, row.log_rhos_ahead);
    if (job_.estimator == Estimator::kRetrace)
      row.q_values = reals_of(direct_.q_values, job_.q_values, slot, q_values_tile_, i, streamed, row.q_values_ahead);
    row.codes = codes_of(i, slot);
    const bool terminal = !job_.coded && !job_.has_truncated && !job_.has_valid;
    const uint8_t highest = terminal ? uint8_t{kTerminated} : highest_code(row.codes, envs_);
    const bool plain = highest <= kTerminated;
    row.next = row.at_truncation = next_;
    if (job_.bootstrap == kStoredValue) row.at_truncation = row.values;
    if (job_.bootstrap == kFinalValues && !plain) row.at_truncation = final_values(row.codes, slot);
    row.carry = job_.estimator == Estimator::kGae ? row.advantages : carry_row_;
    row.summed = partial_;
    run_row(job_.estimator, streamed, plain, row, factors_, pivot_, sums_, envs_);
    row.after = row.carry;
    next_ = row.values;
    if (!partial_) return;
    if (highest < kInvalid) {
      pivot_ = join_sums(partial_, sums_, pivot_, row.advantages, envs_);
    } else {
      int64_t valid = 0;
      for (int64_t n = 0; n < envs_; ++n) {
        spare_row_[valid] = row.advantages[n];
        valid += row.codes[n] != kInvalid;
      }
      moments(partial_, spare_row_, valid);
    }
  }

  static bool aligned(const T* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; }

  const Job& job_;
  const Direct<T> direct_;
  const int64_t n0_, envs_;
  double* partial_ = nullptr;
  Factors<T> factors_;
  Row<T> row_{};
  const T* next_;  // V of the next step
  T pivot_{0};
  Sums<T> sums_;
  alignas(64) T carry_row_[kRowEnvs], advantages_row_[kRowEnvs], targets_row_[kRowEnvs];
  alignas(64) T next_row_[kRowEnvs], spare_row_[kRowEnvs];
  alignas(64) uint8_t codes_row_[kRowEnvs];
  static constexpr int64_t kTile = kTileSteps * kTileEnvs;
  alignas(64) T rewards_tile_[kTile], values_tile_[kTile], advantages_tile_[kTile], targets_tile_[kTile];
  alignas(64) uint8_t dones_tile_[kTile], truncated_tile_[kTile], valid_tile_[kTile];
  alignas(64) T log_rhos_tile_[kTile], q_values_tile_[kTile];
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

// Runs a scan whose arguments are checked. `first` is the output that always exists, and has the dtype and T.
void run(Job& job, const Scan& scan, const Tensor& first) {
  job.num_envs = scan.rewards.size(0);
  job.capacity = scan.rewards.size(1);
  job.num_steps = first.size(1);
  job.start = scan.start;
  if (scan.cursor && job.capacity)
    job.start = static_cast<const int64_t*>(scan.cursor->data_ptr())[1] % job.capacity;
  if (job.num_steps) check_range("start", job.start, 0, job.capacity);
  job.rewards = Plane(scan.rewards);
  job.values = Plane(scan.values);
  job.dones = Plane(scan.dones);
  job.last_values = Plane(scan.last_values);
  auto optional = [](const Optional& x, Plane& plane, bool& has) {
    if ((has = x.has_value())) plane = Plane(*x);
  };
  optional(scan.truncated, job.truncated, job.has_truncated);
  optional(scan.valid, job.valid, job.has_valid);
  optional(scan.advantages, job.advantages, job.has_advantages);
  optional(scan.targets, job.targets, job.has_targets);
  job.bootstrap = scan.bootstrap;
  if (scan.bootstrap == kFinalValues) job.final_values = Plane(*scan.final_values);
  if ((job.has_pool = scan.bootstrap == kFinalValues && scan.final_rows.has_value())) {
    job.final_rows = Plane(*scan.final_rows);
    job.pool_size = scan.final_values->size(0);
  }
  job.coded = scan.coded;
  // Element 0 of the workspace holds the ticket of the GPU backends.
  job.partials = scan.stats ? static_cast<double*>(scan.workspace->data_ptr()) + 1 : nullptr;
  first.scalar_type() == ScalarType::Float ? run<float>(job) : run<double>(job);
  if (!scan.stats) return;
  double total[3] = {};
  for (int64_t block = 0; block < job.blocks; ++block)
    merge(total, job.partials[3 * block], job.partials[3 * block + 1], job.partials[3 * block + 2]);
  std::copy(total, total + 3, static_cast<double*>(scan.stats->data_ptr()));
}

}  // namespace

void gae(const Tensor& rewards, const Tensor& values, const Tensor& dones, const Optional& truncated,
         const Optional& valid, const Tensor& last_values, const Optional& final_values, const Optional& final_rows,
         double gamma, double lam, int64_t start, bool coded, int64_t bootstrap, const Optional& cursor,
         const Tensor& advantages, const Optional& returns, const Optional& stats, const Optional& workspace) {
  const Scan scan{rewards, values, dones, truncated, valid, last_values, final_values, final_rows, start, coded,
                  bootstrap, cursor, advantages, returns, stats, workspace};
  check_gae(scan);
  Job job{};
  job.estimator = Estimator::kGae;
  job.gamma = gamma;
  job.decay = gamma * lam;
  run(job, scan, advantages);
}

void off_policy(const Tensor& rewards, const Tensor& values, const Tensor& dones, const Optional& truncated,
                const Optional& valid, const Tensor& last_values, const Optional& final_values,
                const Optional& final_rows, const Tensor& log_rhos, const Optional& q_values, double gamma, double lam,
                double rho_clip, double c_clip, int64_t start, bool coded, int64_t bootstrap, const Optional& cursor,
                const Optional& advantages, const Tensor& targets, const Optional& stats, const Optional& workspace) {
  const Scan scan{rewards, values, dones, truncated, valid, last_values, final_values, final_rows, start, coded,
                  bootstrap, cursor, advantages, targets, stats, workspace};
  check_off_policy(scan, log_rhos, q_values, rho_clip, c_clip);
  Job job{};
  job.estimator = q_values ? Estimator::kRetrace : Estimator::kVtrace;
  job.log_rhos = Plane(log_rhos);
  if (q_values) job.q_values = Plane(*q_values);
  job.gamma = gamma;
  job.decay = gamma * lam;
  job.rho_clip = rho_clip;
  job.c_clip = c_clip;
  run(job, scan, targets);
}

}  // namespace pydrone
