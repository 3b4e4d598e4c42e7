// A step of the hover and course tasks on the CPU, with the quadrotor's physics if wanted, in one call.
//
// pydrone/envs/hover_task.py, course_task.py, randomizer.py and quadrotor.py specify what it computes and name the
// terms; triton_kernels/quadrotor.py is the same for a GPU. A block of drones is turned from rows into lanes, a vector
// of drones at a time is computed, and the block is turned back. What few drones need in a step, a next target or a new
// episode, is done for each of these by itself.
#include "common.h"
#include "exponential.h"

#include <algorithm>
#include <vector>

namespace pydrone {
namespace {

constexpr int64_t kBlock = 64;   // drones; the log's sums are added block by block, on however many threads
constexpr int64_t kGrain = 16;   // fewest blocks worth a thread
constexpr int kDrawn = 13;       // columns of Randomizer's draws
constexpr int kInertia = 1, kThrust = 2, kLag = 6, kLatency = 7, kWind = 8, kNoise = 9;  // after the mass
constexpr int kObs = 17, kSeen = 13;  // numbers of an observation, and of it before the action
constexpr int kMeans = 8, kSums = 12, kLog = 16;  // pydrone.envs.fused.LOG: first means, then sums

// The operation's `numbers`, in the order in which pydrone/envs/fused.py flattens TaskNumbers, Body and the ranges.
struct Numbers {
  float init_pos[3], target_low[3], target_span[3], weights[6];
  float pos_scale, lin_vel_scale, ang_vel_scale, max_xy, max_z, min_height, max_tilt, at_target, yaw_decay, near_decay,
      per_pi, rpm_range, hover_rpm, lag;
  float wrench[16], gyro[3], damping[3], gravity, mass, h;
  float low[kDrawn], span[kDrawn], high[kDrawn];
};
constexpr int64_t kNumbers = sizeof(Numbers) / sizeof(float);

struct Job {
  Numbers c;
  float *pos, *quat, *vel, *ang_vel;  // rows of these strides
  int64_t pos_row, quat_row, vel_row, ang_vel_row;
  const float* actions;
  float *target, *last_pos, *last_actions;
  int32_t *age, *held;
  int64_t* leg;
  const float* waypoints;
  int64_t num_waypoints;
  float *length, *gained, *passed;
  float *drawn, *wind, *history, *rpm;
  int64_t latest;
  const float *uniform, *normal;
  int64_t uniforms, normals;
  float *obs, *final_obs, *rewards;
  bool *dones, *truncated;
  int64_t num_envs;
  int32_t max_age, hold_steps;
  int64_t substeps;  // 0: no physics
  bool resample, near, tilt;
  bool senses() const { return normals >= 24; }
  bool blows() const { return normals % 24 != 0; }
};

// A block of drones, a row of lanes for each of their numbers.
struct Block {
  alignas(64) float pos[3][kBlock], quat[4][kBlock], vel[3][kBlock], ang_vel[3][kBlock];
  alignas(64) float target[3][kBlock], last_pos[3][kBlock], last_actions[4][kBlock];
  alignas(64) float drawn[kDrawn][kBlock], wind[3][kBlock], rpm[4][kBlock], normal[12][kBlock];
  alignas(64) float command[4][kBlock];  // the actions that reach the motors
  alignas(64) float lin_vel[3][kBlock];  // in the body frame
  alignas(64) float obs[kObs][kBlock], rewards[kBlock];
  alignas(64) float length[kBlock], gained[kBlock], passed[kBlock];
  alignas(64) int32_t age[kBlock], held[kBlock], reached[kBlock], dones[kBlock], truncated[kBlock];
  alignas(64) float log[kSums][kBlock];
};

// V: a vector of float, or float.
template <class V>
struct Three {
  V x, y, z;
};
template <class V>
struct Four {
  V w, x, y, z;  // a quaternion, or one number for each propeller
};

template <class V>
PYDRONE_INLINE V load(const void* from) {
  V x;
  __builtin_memcpy(&x, from, sizeof(V));
  return x;
}
template <class V>
PYDRONE_INLINE void store(void* to, V x) {
  __builtin_memcpy(to, &x, sizeof(V));
}
template <class V>
PYDRONE_INLINE Three<V> load3(const float (*x)[kBlock], int64_t i) {
  return {load<V>(x[0] + i), load<V>(x[1] + i), load<V>(x[2] + i)};
}
template <class V>
PYDRONE_INLINE Four<V> load4(const float (*x)[kBlock], int64_t i) {
  return {load<V>(x[0] + i), load<V>(x[1] + i), load<V>(x[2] + i), load<V>(x[3] + i)};
}
template <class V>
PYDRONE_INLINE void store3(float (*to)[kBlock], int64_t i, const Three<V>& a) {
  store(to[0] + i, a.x), store(to[1] + i, a.y), store(to[2] + i, a.z);
}
template <class V>
PYDRONE_INLINE void store4(float (*to)[kBlock], int64_t i, const Four<V>& a) {
  store(to[0] + i, a.w), store(to[1] + i, a.x), store(to[2] + i, a.y), store(to[3] + i, a.z);
}

template <class V>
PYDRONE_INLINE V all(float x) {
  return x - V{};  // x - 0 is a broadcast
}
template <class V>
PYDRONE_INLINE V magnitude(V x) {
  return x < 0.0f ? -x : x;
}
// Written so that a NaN stays one, as in all selects below.
template <class V>
PYDRONE_INLINE V unit_clamp(V x) {
  x = x < -1.0f ? all<V>(-1.0f) : x;
  return x > 1.0f ? all<V>(1.0f) : x;
}
template <class V>
PYDRONE_INLINE V finite_or_0(V x) {
  return magnitude(x) < __builtin_inff() ? x : V{};
}
PYDRONE_INLINE float root(float x) { return __builtin_sqrtf(x); }
template <class V>
PYDRONE_INLINE V root(V x) {
  for (size_t k = 0; k < sizeof(V) / sizeof(float); ++k) x[k] = __builtin_sqrtf(x[k]);
  return x;
}
template <class V>
PYDRONE_INLINE V power_of_2(V x) {
  return exponential_of<float, typename Vectors<sizeof(V)>::I32>(x * 0.693147180559945f);
}
template <class V>
PYDRONE_INLINE Three<V> cross(const Three<V>& a, const Three<V>& b) {
  return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}
template <class V>
PYDRONE_INLINE V norm(const Three<V>& a) {
  return root(a.x * a.x + a.y * a.y + a.z * a.z);
}
// q (1, r), of length 1.
template <class V>
PYDRONE_INLINE Four<V> turned(const Four<V>& q, const Three<V>& r) {
  const Three<V> u = cross(Three<V>{q.x, q.y, q.z}, r);
  const V w = q.w - (q.x * r.x + q.y * r.y + q.z * r.z);
  const V x = q.x + u.x + q.w * r.x, y = q.y + u.y + q.w * r.y, z = q.z + u.z + q.w * r.z;
  const V length = root(w * w + x * x + y * y + z * z);
  return {w / length, x / length, y / length, z / length};
}
// A vector of the world in the frame of q.
template <class V>
PYDRONE_INLINE Three<V> rotate_inverse(const Four<V>& q, const Three<V>& v) {
  const Three<V> axis{q.x, q.y, q.z}, c = cross(axis, v), d = cross(axis, c);
  return {v.x + 2.0f * (d.x - q.w * c.x), v.y + 2.0f * (d.y - q.w * c.y), v.z + 2.0f * (d.z - q.w * c.z)};
}
// |atan2(y, x)|, off by 3e-7 at most: an odd polynomial up to tan(pi / 8), as in triton_kernels/vectors.py.
template <class V>
PYDRONE_INLINE V angle(V y, V x) {
  constexpr float half_pi = 1.5707963267948966f;
  const V ax = magnitude(x), ay = magnitude(y);
  const V most = ax > ay ? ax : ay, least = ax > ay ? ay : ax;
  const V ratio = least / most;
  const V slope = most == 0.0f ? V{} : ratio;
  const auto steep = slope > 0.41421356f;
  const V turned = (slope - 1.0f) / (slope + 1.0f);
  const V t = steep ? turned : slope;
  const V z = t * t;
  const V tail = ((8.05374449538e-2f * z - 1.38776856032e-1f) * z + 1.99777106478e-1f) * z - 3.33329491539e-1f;
  V found = tail * z * t + t + (steep ? all<V>(half_pi / 2) : V{});
  found = ay > ax ? half_pi - found : found;
  return x < 0.0f ? 2 * half_pi - found : found;
}

// A step of the physics; speeds, mass and the others as Randomizer has drawn them.
template <class V>
PYDRONE_INLINE void fly(Block& b, int64_t i, const Job& job) {
  const Numbers& c = job.c;
  const bool varied = job.drawn;
  auto drawn = [&](int column) { return load<V>(b.drawn[column] + i); };
  Four<V> rpm = load4<V>(b.command, i);
  rpm = {rpm.w * c.rpm_range + c.hover_rpm, rpm.x * c.rpm_range + c.hover_rpm, rpm.y * c.rpm_range + c.hover_rpm,
         rpm.z * c.rpm_range + c.hover_rpm};
  if (job.rpm) {
    const V left = power_of_2<V>(c.lag / drawn(kLag));  // of the difference; without lag 2^-inf = 0
    const Four<V> old = load4<V>(b.rpm, i);
    rpm = {rpm.w + (old.w - rpm.w) * left, rpm.x + (old.x - rpm.x) * left, rpm.y + (old.y - rpm.y) * left,
           rpm.z + (old.z - rpm.z) * left};
    store4(b.rpm, i, rpm);
  }
  Four<V> s{rpm.w * rpm.w, rpm.x * rpm.x, rpm.y * rpm.y, rpm.z * rpm.z};
  if (varied)
    s = {s.w * drawn(kThrust), s.x * drawn(kThrust + 1), s.y * drawn(kThrust + 2), s.z * drawn(kThrust + 3)};
  const float* m = c.wrench;
  V thrust = s.w * m[0] + s.x * m[4] + s.y * m[8] + s.z * m[12];
  Three<V> torque{s.w * m[1] + s.x * m[5] + s.y * m[9] + s.z * m[13],
                  s.w * m[2] + s.x * m[6] + s.y * m[10] + s.z * m[14],
                  s.w * m[3] + s.x * m[7] + s.y * m[11] + s.z * m[15]};
  Three<V> pull{V{}, V{}, all<V>(c.gravity)};
  Three<V> damp{all<V>(c.damping[0]), all<V>(c.damping[1]), all<V>(c.damping[2])};
  if (varied) {
    const V mass = drawn(0), inertia = drawn(kInertia), weight = mass * c.mass;
    const Three<V> wind = load3<V>(b.wind, i);
    thrust /= mass;
    torque = {torque.x / inertia, torque.y / inertia, torque.z / inertia};
    pull = {wind.x / weight, wind.y / weight, pull.z + wind.z / weight};
    damp = {damp.x / inertia, damp.y / inertia, damp.z / inertia};
  }
  damp = {1.0f / (1.0f + damp.x), 1.0f / (1.0f + damp.y), 1.0f / (1.0f + damp.z)};
  Three<V> pos = load3<V>(b.pos, i), vel = load3<V>(b.vel, i), spin = load3<V>(b.ang_vel, i);
  Four<V> q = load4<V>(b.quat, i);
  const float h = c.h, *e = c.gyro;
  for (int64_t k = 0; k < job.substeps; ++k) {
    vel.x += h * (pull.x + 2.0f * (q.x * q.z + q.w * q.y) * thrust);
    vel.y += h * (pull.y + 2.0f * (q.y * q.z - q.w * q.x) * thrust);
    vel.z += h * (pull.z + 2.0f * (0.5f - (q.x * q.x + q.y * q.y)) * thrust);
    pos = {pos.x + h * vel.x, pos.y + h * vel.y, pos.z + h * vel.z};
    const Three<V> next{(spin.x + h * (spin.y * spin.z * e[0] + torque.x)) * damp.x,
                        (spin.y + h * (spin.z * spin.x * e[1] + torque.y)) * damp.y,
                        (spin.z + h * (spin.x * spin.y * e[2] + torque.z)) * damp.z};
    const Three<V> mid{(spin.x + next.x) * 0.5f, (spin.y + next.y) * 0.5f, (spin.z + next.z) * 0.5f};
    spin = next;
    const V a2 = (mid.x * mid.x + mid.y * mid.y + mid.z * mid.z) * (h * h * 0.25f);
    const V half = ((a2 * (2.0f / 15) + 1.0f / 3) * a2 + 1.0f) * (h * 0.5f);
    q = turned(q, Three<V>{mid.x * half, mid.y * half, mid.z * half});
  }
  store3(b.pos, i, pos), store3(b.vel, i, vel), store3(b.ang_vel, i, spin), store4(b.quat, i, q);
  store3(b.lin_vel, i, rotate_inverse(q, vel));
}

// Crashes, time limits, rewards, and whether the target is reached.
template <class V>
PYDRONE_INLINE void judge(Block& b, int64_t i, const Job& job) {
  using I = typename Vectors<sizeof(V)>::I32;
  const Numbers& c = job.c;
  const Three<V> pos = load3<V>(b.pos, i), lin_vel = load3<V>(b.lin_vel, i), spin = load3<V>(b.ang_vel, i);
  const Three<V> target = load3<V>(b.target, i), last_pos = load3<V>(b.last_pos, i);
  const Four<V> q = load4<V>(b.quat, i), a = load4<V>(b.obs + kSeen, i), last = load4<V>(b.last_actions, i);
  const Three<V> off{target.x - pos.x, target.y - pos.y, target.z - pos.z};

  // a sum is finite only if its terms are
  const V total = (pos.x + pos.y + pos.z) + (lin_vel.x + lin_vel.y + lin_vel.z) + (spin.x + spin.y + spin.z) +
                  ((q.w + q.x + q.y + q.z) + (a.w + a.x + a.y + a.z));
  const I finite = magnitude(total) < __builtin_inff();
  I flying = finite & (magnitude(off.x) <= c.max_xy) & (magnitude(off.y) <= c.max_xy) &
             (magnitude(off.z) <= c.max_z) & (pos.z >= c.min_height);
  if (job.tilt) {
    const V sine = unit_clamp(2.0f * (q.w * q.y - q.z * q.x));
    flying &= angle<V>(2.0f * (q.w * q.x + q.y * q.z), 1.0f - 2.0f * (q.x * q.x + q.y * q.y)) <= c.max_tilt;
    flying &= angle<V>(sine, root((1.0f - sine) * (1.0f + sine))) <= c.max_tilt;
  }
  const I crash = ~flying, age = load<I>(b.age + i) + 1, timeout = age >= job.max_age, dones = crash | timeout;
  store(b.age + i, age), store(b.dones + i, dones), store(b.truncated + i, timeout & flying);

  const V far = norm(off);
  const V gain = (pos.x - last_pos.x) * (2.0f * target.x - pos.x - last_pos.x) +
                 (pos.y - last_pos.y) * (2.0f * target.y - pos.y - last_pos.y) +
                 (pos.z - last_pos.z) * (2.0f * target.z - pos.z - last_pos.z);
  const V j0 = a.w - last.w, j1 = a.x - last.x, j2 = a.y - last.y, j3 = a.z - last.z;
  const V yaw = angle<V>(q.w * q.z + q.x * q.y, 0.5f - q.y * q.y - q.z * q.z);
  const V terms[6] = {
      finite_or_0(gain * c.weights[0]),
      finite_or_0((j0 * j0 + j1 * j1 + j2 * j2 + j3 * j3) * c.weights[1]),
      finite_or_0(power_of_2(yaw * c.yaw_decay) * c.weights[2]),
      finite_or_0(norm(spin) * c.per_pi * c.weights[3]),
      crash ? all<V>(c.weights[4]) : V{},
      job.near ? finite_or_0(power_of_2(far * c.near_decay) * c.weights[5]) : V{},
  };
  const V reward = terms[0] + terms[1] + terms[2] + terms[3] + terms[4] + terms[5];
  store(b.rewards + i, reward);

  I reached = far < c.at_target;
  if (job.held) {
    const I held = (load<I>(b.held + i) + 1) & reached;
    reached = held >= job.hold_steps;
    store(b.held + i, held & ~reached);
  }
  store(b.reached + i, reached);
  const V length = load<V>(b.length + i) + 1.0f, gained = load<V>(b.gained + i) + reward;
  store(b.length + i, length), store(b.gained + i, gained);
  V passed{};
  if (job.passed) {
    passed = load<V>(b.passed + i) + (reached ? all<V>(1.0f) : V{});
    store(b.passed + i, passed);
  }
  for (int k = 0; k < 6; ++k) store(b.log[k] + i, terms[k]);
  store(b.log[6] + i, finite_or_0(far));
  store(b.log[7] + i, finite ? V{} : all<V>(1.0f));
  store(b.log[8] + i, dones ? all<V>(1.0f) : V{});
  store(b.log[9] + i, dones ? length : V{});
  store(b.log[10] + i, dones ? gained : V{});
  store(b.log[11] + i, dones ? passed : V{});
}

template <class V>
struct Seen {
  Three<V> target;
  Four<V> quat;
  Three<V> lin_vel, ang_vel;
};

// An observation but for the action.
template <class V>
PYDRONE_INLINE Seen<V> observed(const Three<V>& target, const Three<V>& pos, const Four<V>& quat,
                                const Three<V>& lin_vel, const Three<V>& ang_vel, const Numbers& c) {
  return {{unit_clamp((target.x - pos.x) * c.pos_scale), unit_clamp((target.y - pos.y) * c.pos_scale),
           unit_clamp((target.z - pos.z) * c.pos_scale)},
          quat,
          {unit_clamp(lin_vel.x * c.lin_vel_scale), unit_clamp(lin_vel.y * c.lin_vel_scale),
           unit_clamp(lin_vel.z * c.lin_vel_scale)},
          {unit_clamp(ang_vel.x * c.ang_vel_scale), unit_clamp(ang_vel.y * c.ang_vel_scale),
           unit_clamp(ang_vel.z * c.ang_vel_scale)}};
}
template <class V>
PYDRONE_INLINE Three<V> noisy(const Three<V>& a, const Three<V>& noise, V std) {
  return {a.x + noise.x * std, a.y + noise.y * std, a.z + noise.z * std};
}
template <class V>
PYDRONE_INLINE Four<V> noisy(const Four<V>& q, const Three<V>& noise, V std) {
  const V half = std * 0.5f;
  return turned(q, Three<V>{noise.x * half, noise.y * half, noise.z * half});
}

// The observations of drones whose episode goes on, and the final ones of the others.
template <class V>
PYDRONE_INLINE void observe(Block& b, int64_t i, const Job& job) {
  Three<V> pos = load3<V>(b.pos, i), lin_vel = load3<V>(b.lin_vel, i), ang_vel = load3<V>(b.ang_vel, i);
  Four<V> q = load4<V>(b.quat, i);
  if (job.senses()) {
    auto std = [&](int k) { return load<V>(b.drawn[kNoise + k] + i); };
    pos = noisy(pos, load3<V>(b.normal, i), std(0));
    q = noisy(q, load3<V>(b.normal + 3, i), std(1));
    lin_vel = noisy(lin_vel, load3<V>(b.normal + 6, i), std(2));
    ang_vel = noisy(ang_vel, load3<V>(b.normal + 9, i), std(3));
  }
  const Seen<V> seen = observed(load3<V>(b.target, i), pos, q, lin_vel, ang_vel, job.c);
  store3(b.obs, i, seen.target), store4(b.obs + 3, i, seen.quat), store3(b.obs + 7, i, seen.lin_vel);
  store3(b.obs + 10, i, seen.ang_vel);
}

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
  to_lanes<4>(job.actions + first * 4, 4, count, actions);
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
    if (b.reached[r]) next_target(b, r, first, job);
  for (int64_t i = 0; i < kBlock; i += kLanes) observe<V>(b, i, job);

  to_rows<kObs>(b.obs, count, job.final_obs + first * kObs);
  copy(job.final_obs + first * kObs, count * kObs, job.obs + first * kObs);
  copy(b.rewards, count, job.rewards + first);
  for (int64_t r = 0; r < count; ++r) job.dones[first + r] = b.dones[r], job.truncated[first + r] = b.truncated[r];
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
  const Numbers& c = job.c;
  Three<float> pos{c.init_pos[0], c.init_pos[1], c.init_pos[2]}, lin_vel{}, ang_vel{};
  Four<float> quat{1, 0, 0, 0};
  const float place[3] = {pos.x, pos.y, pos.z};
  copy(place, 3, job.last_pos + n * 3);
  if (job.substeps) {
    copy(place, 3, job.pos + n * 3);
    const float upright[4] = {quat.w, quat.x, quat.y, quat.z};
    copy(upright, 4, job.quat + n * 4);
    std::fill_n(job.vel + n * 3, 3, 0.0f), std::fill_n(job.ang_vel + n * 3, 3, 0.0f);
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
    const float *std = job.drawn + n * kDrawn + kNoise, *x = job.normal + n * job.normals + 12;
    pos = noisy(pos, {x[0], x[1], x[2]}, std[0]);
    quat = noisy(quat, {x[3], x[4], x[5]}, std[1]);
    lin_vel = noisy(lin_vel, {x[6], x[7], x[8]}, std[2]);
    ang_vel = noisy(ang_vel, {x[9], x[10], x[11]}, std[3]);
  }
  const Seen<float> seen = observed(target, pos, quat, lin_vel, ang_vel, c);
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
    return add(name, x, x.numel() * static_cast<int64_t>(x.element_size()), written);
  }
  // Rows of `width` numbers at any stride, which are only read.
  float* rows(const char* name, const Tensor& x, int64_t num_envs, int64_t width, int64_t& stride) {
    check_shape(name, x, {num_envs, width});
    check_dtype(name, x, ScalarType::Float);
    STD_TORCH_CHECK(x.stride(1) == 1, name, ": expected numbers of a row side by side, got stride ", x.stride(1));
    stride = x.stride(0);
    return static_cast<float*>(add(name, x, span(x), false));
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
  bool writes(const float* from, int64_t count) const {
    const auto first = reinterpret_cast<uintptr_t>(from), end = first + count * sizeof(float);
    return std::any_of(extents_.begin(), extents_.end(),
                       [&](const Extent& x) { return x.written && x.first < end && first < x.end; });
  }

 private:
  struct Extent {
    uintptr_t first, end;
    const char* name;
    bool written;
  };
  void* add(const char* name, const Tensor& x, int64_t bytes, bool written) {
    void* const data = x.data_ptr();
    const auto first = reinterpret_cast<uintptr_t>(data);
    if (bytes) extents_.push_back({first, first + static_cast<uintptr_t>(bytes), name, written});
    return data;
  }
  std::vector<Extent> extents_;
};

}  // namespace

void task_step(const Tensor& pos, const Tensor& quat, const Tensor& vel, const Tensor& ang_vel, const Tensor& actions,
               const Tensor& target, const Tensor& last_pos, const Tensor& last_actions, const Tensor& age,
               const Optional& held, const Optional& leg, const Optional& waypoints, const Tensor& sums,
               const Optional& drawn, const Optional& wind, const Optional& history, const Optional& rpm,
               const Tensor& uniform, const Optional& normal, const Tensor& obs, const Tensor& final_obs,
               const Tensor& rewards, const Tensor& dones, const Tensor& truncated, const Tensor& log,
               const Tensor& numbers, int64_t max_age, int64_t hold_steps, int64_t substeps, bool resample, bool near,
               bool tilt) {
  Job job;
  Arguments given;
  check_shape("target", target, {-1, 3});
  const int64_t n = job.num_envs = target.size(0);
  check_shape("actions", actions, {n, 4});
  check_dtype("actions", actions, ScalarType::Float);
  check_contiguous("actions", actions);
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
  job.uniforms = drawn ? 3 + kDrawn : 3;
  job.uniform = given.floats("uniform", uniform, {n, job.uniforms}, false);
  job.normal = given.floats("normal", normal, {n, -1}, false);
  job.normals = normal ? normal->size(1) : 0;
  STD_TORCH_CHECK(!normal || job.normals == 2 || job.normals == 24 || job.normals == 26,
                  "normal: expected 2, 24 or 26 columns, got ", job.normals);
  job.obs = given.floats("obs", obs, {n, kObs}), job.final_obs = given.floats("final_obs", final_obs, {n, kObs});
  job.rewards = given.floats("rewards", rewards, {n});
  job.dones = static_cast<bool*>(given.take("dones", dones, ScalarType::Bool, {n}));
  job.truncated = static_cast<bool*>(given.take("truncated", truncated, ScalarType::Bool, {n}));
  auto* const means = given.floats("log", log, {kLog});
  std::memcpy(&job.c, given.floats("numbers", numbers, {kNumbers}, false), sizeof(Numbers));
  given.check_apart();
  job.actions = static_cast<const float*>(actions.data_ptr());
  std::vector<float> copied;  // a policy may hand back what it was shown
  if (given.writes(job.actions, n * 4)) {
    copied.assign(job.actions, job.actions + n * 4);
    job.actions = copied.data();
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
