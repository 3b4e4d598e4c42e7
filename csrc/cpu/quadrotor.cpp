// A step of the hover and course tasks on the CPU, with the quadrotor's physics if wanted, in one call.
//
// pydrone/envs/hover_task.py, course_task.py, randomizer.py and quadrotor.py specify what it computes and name the
// terms; triton_kernels/quadrotor.py is the same for a GPU. A block of drones is turned from rows into lanes, a vector
// of drones at a time is computed (quadrotor.h), and the block is turned back. What few drones need in a step, a next
// target or a new episode, is done for each of these by itself.
#include "quadrotor.h"

#include <algorithm>
#include <vector>

namespace pydrone {
namespace {

constexpr int64_t kGrain = 16;  // fewest blocks worth a thread

// Rows of kColumns numbers as lanes, and back. Lanes without a drone are 0.
template <int kColumns>
PYDRONE_INLINE void to_lanes(const float* rows, int64_t stride, int64_t count, float (*lanes)[kBlock]) {
  for (int64_t r = 0; r < count; ++r)
    for (int j = 0; j < kColumns; ++j) lanes[j][r] = rows[r * stride + j];
  for (int j = 0; count < kBlock && j < kColumns; ++j)
    for (int64_t r = count; r < kBlock; ++r) lanes[j][r] = 0;
}
template <int kColumns>
PYDRONE_INLINE void to_rows(const float (*lanes)[kBlock], int64_t count, float* rows) {
  for (int64_t r = 0; r < count; ++r)
    for (int j = 0; j < kColumns; ++j) rows[r * kColumns + j] = lanes[j][r];
}
template <class T>
PYDRONE_INLINE void copy(const T* from, int64_t count, T* to) {
  __builtin_memcpy(to, from, count * sizeof(T));
}

// The target drawn for a drone, which a course shifts its waypoint by.
PYDRONE_INLINE Three<float> drawn_target(const Job& job, int64_t n, int64_t leg) {
  const Numbers& c = job.c;
  const float* draw = job.uniform + n * job.uniforms;
  Three<float> at{draw[0] * c.target_span[0] + c.target_low[0], draw[1] * c.target_span[1] + c.target_low[1],
                  draw[2] * c.target_span[2] + c.target_low[2]};
  if (job.waypoints) {
    const float* point = job.waypoints + 3 * leg;
    at = {point[0] + at.x, point[1] + at.y, point[2] + at.z};
  }
  return at;
}

// A drone's target after the one that it has reached.
PYDRONE_INLINE void next_target(Block& b, int64_t r, int64_t first, const Job& job) {
  const int64_t n = first + r;
  int64_t leg = 0;
  if (job.waypoints) {  // unsigned: whatever the memory holds, the leg is one of the course
    leg = static_cast<int64_t>((static_cast<uint64_t>(job.leg[n]) + 1) % static_cast<uint64_t>(job.num_waypoints));
    job.leg[n] = leg;
  }
  const Three<float> at = drawn_target(job, n, leg);
  b.target[0][r] = at.x, b.target[1][r] = at.y, b.target[2][r] = at.z;
}

// The actions that reach the motors after their latency, from a history that has not moved on yet; then it does.
PYDRONE_INLINE void delay(Block& b, int64_t first, int64_t count, const Job& job) {
  const int64_t place = job.num_envs * 4;
  float* const rows = job.history + first * 4;
  for (int64_t r = 0; r < count; ++r) {
    const float late = job.drawn[(first + r) * kDrawn + kLatency];
    if (!(late >= 1)) continue;
    for (int j = 0; j < 4; ++j)
      b.command[j][r] = late < job.latest + 1 ? rows[(static_cast<int64_t>(late) - 1) * place + r * 4 + j] : 0;
  }
  for (int64_t k = job.latest; k > 0; --k) copy(rows + (k - 1) * place, count * 4, rows + k * place);
  to_rows<4>(b.obs + kSeen, count, rows);
}

// Drones [first, first + count) but for new episodes; `sums` [kSums] receives their part of the log.
template <int kSize>
PYDRONE_INLINE void step_block_body(const Job& job, int64_t first, int64_t count, double* sums) {
  using V = typename Vectors<kSize>::F32;
  constexpr int64_t kLanes = kSize / sizeof(float);
  Block b;
  float (*const actions)[kBlock] = b.obs + kSeen;
  to_lanes<3>(job.pos + first * job.pos_row, job.pos_row, count, b.pos);
  to_lanes<4>(job.quat + first * job.quat_row, job.quat_row, count, b.quat);
  to_lanes<3>(job.vel + first * job.vel_row, job.vel_row, count, job.substeps ? b.vel : b.lin_vel);
  to_lanes<3>(job.ang_vel + first * job.ang_vel_row, job.ang_vel_row, count, b.ang_vel);
  to_lanes<4>(job.actions + first * job.actions_row, job.actions_row, count, actions);
  to_lanes<3>(job.target + first * 3, 3, count, b.target);
  to_lanes<3>(job.last_pos + first * 3, 3, count, b.last_pos);
  to_lanes<4>(job.last_actions + first * 4, 4, count, b.last_actions);
  if (job.drawn) {
    to_lanes<kDrawn>(job.drawn + first * kDrawn, kDrawn, count, b.drawn);
    to_lanes<3>(job.wind + first * 3, 3, count, b.wind);
  }
  if (job.rpm) to_lanes<4>(job.rpm + first * 4, 4, count, b.rpm);
  if (job.senses()) to_lanes<12>(job.normal + first * job.normals, job.normals, count, b.normal);
  to_lanes<1>(job.length + first, 1, count, &b.length), to_lanes<1>(job.gained + first, 1, count, &b.gained);
  if (job.passed) to_lanes<1>(job.passed + first, 1, count, &b.passed);
  for (int64_t r = 0; r < kBlock; ++r) b.age[r] = r < count ? job.age[first + r] : 0;
  for (int64_t r = 0; job.held && r < kBlock; ++r) b.held[r] = r < count ? job.held[first + r] : 0;

  for (int j = 0; j < 4; ++j)
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const V a = load<V>(actions[j] + i);
      store(actions[j] + i, magnitude(a) < __builtin_inff() ? unit_clamp(a) : all<V>(__builtin_nanf("")));
    }
  if (job.substeps) {
    __builtin_memcpy(b.command, actions, sizeof(b.command));
    if (job.history) delay(b, first, count, job);
    for (int64_t i = 0; i < kBlock; i += kLanes) fly<V>(b, i, job);
  }
  for (int64_t i = 0; i < kBlock; i += kLanes) judge<V>(b, i, job);
  for (int64_t r = 0; job.resample && r < count; ++r)
    if (b.reached[r] > 0) next_target(b, r, first, job);
  for (int64_t i = 0; i < kBlock; i += kLanes) observe<V>(b, i, job);

  to_rows<kObs>(b.obs, count, job.final_obs + first * kObs);
  copy(job.final_obs + first * kObs, count * kObs, job.obs + first * kObs);
  copy(b.rewards, count, job.rewards + first);
  for (int64_t r = 0; r < count; ++r) job.dones[first + r] = b.dones[r] > 0;
  for (int64_t r = 0; r < count; ++r) job.truncated[first + r] = b.truncated[r] > 0;
  copy(b.age, count, job.age + first);
  if (job.held) copy(b.held, count, job.held + first);
  to_rows<3>(b.target, count, job.target + first * 3);
  to_rows<3>(b.pos, count, job.last_pos + first * 3);
  to_rows<4>(actions, count, job.last_actions + first * 4);
  copy(b.length, count, job.length + first), copy(b.gained, count, job.gained + first);
  if (job.passed) copy(b.passed, count, job.passed + first);
  if (job.substeps) {
    to_rows<3>(b.pos, count, job.pos + first * 3);
    to_rows<4>(b.quat, count, job.quat + first * 4);
    to_rows<3>(b.vel, count, job.vel + first * 3);
    to_rows<3>(b.ang_vel, count, job.ang_vel + first * 3);
    if (job.rpm) to_rows<4>(b.rpm, count, job.rpm + first * 4);
  }
  // The order of the sums is the same for every instruction set.
  for (int k = 0; k < kSums; ++k) {
    double lanes[8] = {};
    for (int64_t r = count; r < kBlock; ++r) b.log[k][r] = 0;
    for (int64_t r = 0; r < kBlock; r += 8)
      for (int j = 0; j < 8; ++j) lanes[j] += b.log[k][r + j];
    sums[k] = 0;
    for (double lane : lanes) sums[k] += lane;
  }
}
PYDRONE_VERSIONED(void, step_block, step_block_body, (const Job& job, int64_t first, int64_t count, double* sums),
                  (job, first, count, sums))

// Randomizer.restart for one drone.
void redraw(const Job& job, int64_t n) {
  const Numbers& c = job.c;
  const float* uniform = job.uniform + n * job.uniforms + 3;
  float* drawn = job.drawn + n * kDrawn;
  for (int k = 0; k < kDrawn; ++k) {
    float x = uniform[k] * c.span[k] + c.low[k];
    if (k == kLatency) x = __builtin_floorf(x);
    drawn[k] = x > c.high[k] ? c.high[k] : x;  // a product may round up
  }
  if (job.blows()) {
    const float *way = job.normal + (n + 1) * job.normals - 2, length = root(way[0] * way[0] + way[1] * way[1]);
    for (int k = 0; k < 2; ++k) job.wind[n * 3 + k] = way[k] / (length < 1e-6f ? 1e-6f : length) * drawn[kWind];
  }
  for (int64_t k = 0; job.history && k <= job.latest; ++k)
    std::fill_n(job.history + (k * job.num_envs + n) * 4, 4, 0.0f);
  if (job.rpm) std::fill_n(job.rpm + n * 4, 4, c.hover_rpm);
}

// A new episode of drone n: everything that its first state and observation are made of. The final observation of the
// old one stands already.
void begin(const Job& job, int64_t n) {
  const float picked = job.num_initial > 1 ? job.uniform[(n + 1) * job.uniforms - 1] * job.num_initial : 0;
  const bool known = picked >= 0 && picked < job.num_initial;  // whatever the memory holds
  const float* x = job.initial + (known ? static_cast<int64_t>(picked) : 0) * kInitial;
  Three<float> pos{x[0], x[1], x[2]}, ang_vel{x[10], x[11], x[12]}, lin_vel{x[13], x[14], x[15]};
  Four<float> quat{x[3], x[4], x[5], x[6]};
  copy(x, 3, job.last_pos + n * 3);
  if (job.substeps) {
    copy(x, 3, job.pos + n * 3), copy(x + 3, 4, job.quat + n * 4);
    copy(x + 7, 3, job.vel + n * 3), copy(x + 10, 3, job.ang_vel + n * 3);
  }
  const Three<float> target = drawn_target(job, n, 0);
  job.target[n * 3] = target.x, job.target[n * 3 + 1] = target.y, job.target[n * 3 + 2] = target.z;
  if (job.leg) job.leg[n] = 0;
  std::fill_n(job.last_actions + n * 4, 4, 0.0f);
  job.age[n] = 0;
  if (job.held) job.held[n] = 0;
  job.length[n] = job.gained[n] = 0;
  if (job.passed) job.passed[n] = 0;
  if (job.drawn) redraw(job, n);
  if (job.senses()) {
    const float *std = job.drawn + n * kDrawn + kNoise, *noise = job.normal + n * job.normals + 12;
    pos = noisy(pos, {noise[0], noise[1], noise[2]}, std[0]);
    quat = noisy(quat, {noise[3], noise[4], noise[5]}, std[1]);
    lin_vel = noisy(lin_vel, {noise[6], noise[7], noise[8]}, std[2]);
    ang_vel = noisy(ang_vel, {noise[9], noise[10], noise[11]}, std[3]);
  }
  const Seen<float> seen = observed(target, pos, quat, lin_vel, ang_vel, job.c);
  static_assert(sizeof(seen) == kSeen * sizeof(float));
  std::memcpy(job.obs + n * kObs, &seen, sizeof(seen));
  std::fill_n(job.obs + n * kObs + kSeen, 4, 0.0f);
}

// Checks arguments, and collects the memory that they use.
class Arguments {
 public:
  float* floats(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes, bool written = true) {
    return static_cast<float*>(take(name, x, ScalarType::Float, sizes, written));
  }
  float* floats(const char* name, const Optional& x, std::initializer_list<int64_t> sizes, bool written = true) {
    return x ? floats(name, *x, sizes, written) : nullptr;
  }
  void* take(const char* name, const Tensor& x, ScalarType type, std::initializer_list<int64_t> sizes,
             bool written = true) {
    check_shape(name, x, sizes);
    check_dtype(name, x, type);
    check_contiguous(name, x);
    void* const data = x.data_ptr();
    const auto start = reinterpret_cast<uintptr_t>(data);
    if (x.numel()) extents_.push_back({start, start + x.numel() * x.element_size(), name, written});
    return data;
  }
  // Rows of `width` numbers at any stride, which are only read.
  static float* rows(const char* name, const Tensor& x, int64_t num_envs, int64_t width, int64_t& stride) {
    check_shape(name, x, {num_envs, width});
    check_dtype(name, x, ScalarType::Float);
    STD_TORCH_CHECK(x.stride(1) == 1, name, ": expected numbers of a row side by side, got stride ", x.stride(1));
    stride = x.stride(0);
    return static_cast<float*>(x.data_ptr());
  }
  // What is written shares no memory with another argument.
  void check_apart() {
    std::sort(extents_.begin(), extents_.end(), [](const Extent& x, const Extent& y) { return x.first < y.first; });
    const Extent *last = nullptr, *last_written = nullptr;  // those that reach furthest
    for (const Extent& x : extents_) {
      const Extent* met = x.written ? last : last_written;
      STD_TORCH_CHECK(!met || met->end <= x.first, x.name, ": expected memory of its own, got some shared with ",
                      met->name);
      if (!last || x.end > last->end) last = &x;
      if (x.written && (!last_written || x.end > last_written->end)) last_written = &x;
    }
  }
  // `rows`, or a copy of them where the step writes: a policy may hand back what it was shown.
  template <class Rows>
  Rows kept(Rows rows, int64_t num_envs, int64_t width, int64_t& stride) {
    const auto first = reinterpret_cast<uintptr_t>(rows);
    const auto end = first + ((num_envs - 1) * stride + width) * sizeof(float);
    const bool meet = std::any_of(extents_.begin(), extents_.end(),
                                  [&](const Extent& x) { return x.written && x.first < end && first < x.end; });
    if (!num_envs || !meet) return rows;
    std::vector<float>& copy = copies_.emplace_back();
    for (int64_t n = 0; n < num_envs; ++n) copy.insert(copy.end(), rows + n * stride, rows + n * stride + width);
    stride = width;
    return copy.data();
  }

 private:
  struct Extent {
    uintptr_t first, end;
    const char* name;
    bool written;
  };
  std::vector<Extent> extents_;
  std::vector<std::vector<float>> copies_;
};

}  // namespace

void task_step(const Tensor& pos, const Tensor& quat, const Tensor& vel, const Tensor& ang_vel, const Tensor& actions,
               const Tensor& target, const Tensor& last_pos, const Tensor& last_actions, const Tensor& age,
               const Optional& held, const Optional& leg, const Optional& waypoints, const Tensor& sums,
               const Tensor& initial, const Optional& drawn, const Optional& wind, const Optional& history,
               const Optional& rpm, const Tensor& uniform, const Optional& normal, const Tensor& obs,
               const Tensor& final_obs, const Tensor& rewards, const Tensor& dones, const Tensor& truncated,
               const Tensor& log, const Tensor& numbers, int64_t max_age, int64_t hold_steps, int64_t substeps,
               bool resample, bool near, bool tilt) {
  Job job;
  Arguments given;
  check_shape("target", target, {-1, 3});
  const int64_t n = job.num_envs = target.size(0);
  job.actions = given.rows("actions", actions, n, 4, job.actions_row);
  check_range("substeps", substeps, 0, int64_t{1} << 31);
  check_range("max_age", max_age, 0, int64_t{1} << 31);
  check_range("hold_steps", hold_steps, 0, int64_t{1} << 31);
  job.substeps = substeps, job.resample = resample, job.near = near, job.tilt = tilt;
  job.max_age = static_cast<int32_t>(max_age), job.hold_steps = static_cast<int32_t>(hold_steps);
  if (substeps) {
    job.pos = given.floats("pos", pos, {n, 3}), job.quat = given.floats("quat", quat, {n, 4});
    job.vel = given.floats("vel", vel, {n, 3}), job.ang_vel = given.floats("ang_vel", ang_vel, {n, 3});
    job.pos_row = job.vel_row = job.ang_vel_row = 3, job.quat_row = 4;
  } else {
    job.pos = given.rows("pos", pos, n, 3, job.pos_row), job.quat = given.rows("quat", quat, n, 4, job.quat_row);
    job.vel = given.rows("vel", vel, n, 3, job.vel_row);
    job.ang_vel = given.rows("ang_vel", ang_vel, n, 3, job.ang_vel_row);
  }
  job.target = given.floats("target", target, {n, 3});
  job.last_pos = given.floats("last_pos", last_pos, {n, 3});
  job.last_actions = given.floats("last_actions", last_actions, {n, 4});
  job.age = static_cast<int32_t*>(given.take("age", age, ScalarType::Int, {n}));
  job.held = held ? static_cast<int32_t*>(given.take("held", *held, ScalarType::Int, {n})) : nullptr;
  STD_TORCH_CHECK(leg.has_value() == waypoints.has_value(), "leg: expected one where there are waypoints, else None");
  job.leg = leg ? static_cast<int64_t*>(given.take("leg", *leg, ScalarType::Long, {n})) : nullptr;
  job.waypoints = given.floats("waypoints", waypoints, {-1, 3}, false);
  job.num_waypoints = waypoints ? waypoints->size(0) : 0;
  STD_TORCH_CHECK(!waypoints || job.num_waypoints, "waypoints: expected at least one, got none");
  job.initial = given.floats("initial", initial, {-1, kInitial}, false);
  job.num_initial = initial.size(0);
  STD_TORCH_CHECK(job.num_initial, "initial: expected at least one state, got none");
  job.length = given.floats("sums", sums, {leg ? 4 : 3, n}) + n;
  job.gained = job.length + n, job.passed = leg ? job.gained + n : nullptr;
  job.drawn = given.floats("drawn", drawn, {n, kDrawn});
  const std::pair<const char*, const Optional*> parts[] = {{"wind", &wind}, {"history", &history}, {"rpm", &rpm},
                                                           {"normal", &normal}};
  for (const auto& [name, x] : parts)
    STD_TORCH_CHECK(drawn || !*x, name, ": expected None without drawn, got a tensor");
  STD_TORCH_CHECK(!drawn || wind, "wind: expected a tensor with drawn, got None");
  job.wind = given.floats("wind", wind, {n, 3});
  job.history = given.floats("history", history, {-1, n, 4});
  job.latest = history ? history->size(0) - 1 : 0;
  STD_TORCH_CHECK(job.latest >= 0, "history: expected at least one step, got none");
  job.rpm = given.floats("rpm", rpm, {n, 4});
  job.uniforms = 3 + (drawn ? kDrawn : 0) + (job.num_initial > 1);
  job.uniform = given.floats("uniform", uniform, {n, job.uniforms}, false);
  job.normal = given.floats("normal", normal, {n, -1}, false);
  job.normals = normal ? normal->size(1) : 0;
  STD_TORCH_CHECK(!normal || job.normals == 2 || job.normals == 24 || job.normals == 26,
                  "normal: expected 2, 24 or 26 columns, got ", job.normals);
  job.obs = given.floats("obs", obs, {n, kObs}), job.final_obs = given.floats("final_obs", final_obs, {n, kObs});
  job.rewards = given.floats("rewards", rewards, {n});
  job.dones = static_cast<bool*>(given.take("dones", dones, ScalarType::Bool, {n}));
  job.truncated = static_cast<bool*>(given.take("truncated", truncated, ScalarType::Bool, {n}));
  auto* const means = given.floats("log", log, {kSums});
  std::memcpy(&job.c, given.floats("numbers", numbers, {kNumbers}, false), sizeof(Numbers));
  given.check_apart();
  job.actions = given.kept(job.actions, n, 4, job.actions_row);
  if (!substeps) {
    job.pos = given.kept(job.pos, n, 3, job.pos_row), job.quat = given.kept(job.quat, n, 4, job.quat_row);
    job.vel = given.kept(job.vel, n, 3, job.vel_row), job.ang_vel = given.kept(job.ang_vel, n, 3, job.ang_vel_row);
  }

  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<double> parts_of_log(blocks * kSums);
  torch::stable::parallel_for(0, blocks, kGrain, [&](int64_t from, int64_t to) {
    for (int64_t block = from; block < to; ++block) {
      const int64_t first = block * kBlock, end = std::min(first + kBlock, n);
      step_block(job, first, end - first, parts_of_log.data() + block * kSums);
      for (int64_t i = first; i < end; ++i)
        if (job.dones[i]) begin(job, i);
    }
  });
  for (int k = 0; k < kSums; ++k) {
    double total = 0;
    for (int64_t block = 0; block < blocks; ++block) total += parts_of_log[block * kSums + k];
    means[k] = static_cast<float>(k < kMeans ? total / n : total);
  }
}

}  // namespace pydrone
