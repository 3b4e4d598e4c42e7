// One drone's part of a step, or a vector of drones': the quadrotor's physics, what the tasks judge, and observations.
#pragma once

#include "common.h"
#include "exponential.h"

namespace pydrone {
namespace {

constexpr int64_t kBlock = 64;   // drones; the log's sums are added block by block, on however many threads
constexpr int kDrawn = 13;       // columns of Randomizer's draws
constexpr int kInertia = 1, kThrust = 2, kLag = 6, kLatency = 7, kWind = 8, kNoise = 9;  // after the mass
constexpr int kObs = 17, kSeen = 13;  // numbers of an observation, and of it before the action
constexpr int kInitial = 16;  // numbers of an initial state, see pydrone.envs.hover_task.Constants
constexpr int kMeans = 8, kSums = 12;  // pydrone.envs.fused.LOG: first means, then sums

// The operation's `numbers`, in the order in which pydrone/envs/fused.py flattens TaskNumbers, Body and the ranges.
struct Numbers {
  float target_low[3], target_span[3], weights[6];
  float pos_scale, lin_vel_scale, ang_vel_scale, max_xy, max_z, min_height, max_tilt, at_target, yaw_decay, near_decay,
      per_pi, rpm_range, hover_rpm, lag;
  float wrench[16], gyro[3], damping[3], gravity, mass, h;
  float low[kDrawn], span[kDrawn], high[kDrawn];
};
constexpr int64_t kNumbers = sizeof(Numbers) / sizeof(float);

struct Job {
  Numbers c;
  float *pos, *quat, *vel, *ang_vel;  // rows of these strides
  int64_t pos_row, quat_row, vel_row, ang_vel_row, actions_row;
  const float* actions;
  float *target, *last_pos, *last_actions;
  int32_t *age, *held;
  int64_t* leg;
  const float *waypoints, *initial;  // initial: rows of kInitial
  int64_t num_waypoints, num_initial;
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
  alignas(64) float reached[kBlock], dones[kBlock], truncated[kBlock];  // 1 or 0
  alignas(64) int32_t age[kBlock], held[kBlock];
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
// 1 where `is`, else 0. Flags are numbers, and joined by products, since GCC 12 takes `&` and `|` of comparisons of 64
// bytes apart into scalars; the empty assembly hides from it that products of flags are those.
template <class V, class I>
PYDRONE_INLINE V flag(I is) {
  V x = is ? all<V>(1.0f) : V{};
#if defined(PYDRONE_VERSIONS)
  asm("" : "+v"(x));
#endif
  return x;
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
  const V finite = flag<V>(magnitude(total) < __builtin_inff());
  V flying = finite * flag<V>(magnitude(off.x) <= c.max_xy) * flag<V>(magnitude(off.y) <= c.max_xy) *
             flag<V>(magnitude(off.z) <= c.max_z) * flag<V>(pos.z >= c.min_height);
  if (job.tilt) {
    const V sine = unit_clamp(2.0f * (q.w * q.y - q.z * q.x));
    const V roll = angle<V>(2.0f * (q.w * q.x + q.y * q.z), 1.0f - 2.0f * (q.x * q.x + q.y * q.y));
    flying *= flag<V>(roll <= c.max_tilt) * flag<V>(angle<V>(sine, root((1.0f - sine) * (1.0f + sine))) <= c.max_tilt);
  }
  const I age = load<I>(b.age + i) + 1;
  const V timeout = flag<V>(age >= job.max_age), truncated = timeout * flying, dones = 1.0f - flying + truncated;
  store(b.age + i, age), store(b.dones + i, dones), store(b.truncated + i, truncated);

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
      (1.0f - flying) * c.weights[4],
      job.near ? finite_or_0(power_of_2(far * c.near_decay) * c.weights[5]) : V{},
  };
  const V reward = terms[0] + terms[1] + terms[2] + terms[3] + terms[4] + terms[5];
  store(b.rewards + i, reward);

  V reached = flag<V>(far < c.at_target);
  if (job.held) {
    const I longer = load<I>(b.held + i) + 1, held = reached > 0.0f ? longer : I{};
    reached = flag<V>(held >= job.hold_steps);
    store(b.held + i, reached > 0.0f ? I{} : held);
  }
  const V length = load<V>(b.length + i) + 1.0f, gained = load<V>(b.gained + i) + reward;
  V passed{};
  if (job.passed) {
    passed = load<V>(b.passed + i) + reached;
    store(b.passed + i, passed);
  }
  store(b.reached + i, reached), store(b.length + i, length), store(b.gained + i, gained);
  for (int k = 0; k < 6; ++k) store(b.log[k] + i, terms[k]);
  store(b.log[6] + i, finite_or_0(far));
  store(b.log[7] + i, 1.0f - finite);
  store(b.log[8] + i, dones);
  store(b.log[9] + i, dones * length);
  store(b.log[10] + i, dones * gained);
  store(b.log[11] + i, dones * passed);
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

}  // namespace
}  // namespace pydrone
