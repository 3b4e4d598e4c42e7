// Gradient clipping and Adam on the CPU: one pass for the norms and one for everything else, instead of two dozen
// operations on small tensors.
#include "common.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace pydrone {
namespace {

constexpr int64_t kPiece = 8192;    // elements handled at a time: 32 KiB in each of the four arrays
constexpr int64_t kGrain = 8;       // fewest whole pieces worth a thread
constexpr int64_t kLanes = 16;
constexpr double kNormEpsilon = 1e-6;  // torch.nn.utils.clip_grad_norm_'s

struct Piece {
  float *parameter, *exp_avg, *exp_avg_sq;
  const float* grad;
  int64_t size, index;  // elements; index of the parameter
  double squares;
};

struct Rates {
  float rest1, beta2, rest2, epsilon;  // rest: 1 - beta, computed in double before rounding
  float scale;                         // factor of the gradients
  float step_size, correction;         // lr / (1 - beta1^t); sqrt(1 - beta2^t)
};

// Lane sums in float64, in which the square of a float is exact.
template <int>
PYDRONE_INLINE double sum_of_squares_body(const float* x, int64_t size) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += static_cast<double>(x[i + k]) * x[i + k];
  for (; i < size; ++i) lanes[0] += static_cast<double>(x[i]) * x[i];
  double total = 0;
  for (double lane : lanes) total += lane;
  return total;
}
PYDRONE_VERSIONED(double, sum_of_squares, sum_of_squares_body, (const float* x, int64_t size), (x, size))

template <int>
PYDRONE_INLINE void update_body(float* __restrict parameter, float* __restrict exp_avg, float* __restrict exp_avg_sq,
                                const float* __restrict grad, int64_t size, const Rates& rates) {
  const auto [rest1, beta2, rest2, epsilon, scale, step_size, correction] = rates;
  for (int64_t i = 0; i < size; ++i) {
    const float g = grad[i] * scale;
    const float m = exp_avg[i] + rest1 * (g - exp_avg[i]);
    const float v = beta2 * exp_avg_sq[i] + rest2 * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    parameter[i] -= step_size * m / (std::sqrt(v) / correction + epsilon);
  }
}
PYDRONE_VERSIONED(void, update, update_body,
                  (float* __restrict parameter, float* __restrict exp_avg, float* __restrict exp_avg_sq,
                   const float* __restrict grad, int64_t size, const Rates& rates),
                  (parameter, exp_avg, exp_avg_sq, grad, size, rates))

float& scalar(const char* name, const Tensor& x) {
  check_shape(name, x, {});
  check_dtype(name, x, ScalarType::Float);
  return *static_cast<float*>(x.data_ptr());
}

// The learning rate for the next step, in float32 as Learner.adapt_learning_rate computes it.
float adapted(float rate, float kl, const std::vector<double>& schedule) {
  const double desired = schedule[0];
  const float zero = static_cast<float>(schedule[1]), factor = static_cast<float>(schedule[2]),
              least = static_cast<float>(schedule[3]), most = static_cast<float>(schedule[4]);
  if (kl > static_cast<float>(2 * desired)) return std::min(rate, std::max(rate / factor, least));
  if (kl > zero && kl < static_cast<float>(desired / 2)) return std::max(rate, std::min(rate * factor, most));
  return rate;
}

// No two of these dense tensors share memory.
void check_all_apart(std::initializer_list<std::pair<const char*, const std::vector<Tensor>*>> lists, const Tensor& norms,
                     const Tensor& learning_rate, const Optional& kl) {
  struct Extent {
    uintptr_t first, last;
    const char* name;
  };
  std::vector<Extent> extents;
  auto add = [&](const char* name, const Tensor& x) {
    const auto first = reinterpret_cast<uintptr_t>(x.data_ptr());
    if (x.numel()) extents.push_back({first, first + static_cast<uintptr_t>(x.numel()) * sizeof(float), name});
  };
  for (const auto& [name, list] : lists)
    for (const Tensor& x : *list) add(name, x);
  add("norms", norms);
  if (kl) add("learning_rate", learning_rate);  // only then is it written
  std::sort(extents.begin(), extents.end(), [](const Extent& x, const Extent& y) { return x.first < y.first; });
  for (size_t i = 1; i < extents.size(); ++i)
    STD_TORCH_CHECK(extents[i - 1].last <= extents[i].first, extents[i].name,
                    ": expected memory of its own, got some shared with ", extents[i - 1].name);
}

}  // namespace

void clipped_adam(const std::vector<Tensor>& parameters, const std::vector<Tensor>& grads,
                  const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                  const std::vector<Tensor>& steps, const std::vector<int64_t>& groups, double max_norm,
                  const Tensor& learning_rate, double beta1, double beta2, double epsilon, const Tensor& norms,
                  const Optional& kl, const std::vector<double>& schedule) {
  const size_t count = parameters.size();
  STD_TORCH_CHECK(count > 0, "parameters: expected at least one, got none");
  const auto lists = {std::pair{"grads", &grads}, {"exp_avgs", &exp_avgs}, {"exp_avg_sqs", &exp_avg_sqs}, {"steps", &steps}};
  for (const auto& [name, list] : lists)
    STD_TORCH_CHECK(list->size() == count, name, ": expected one for each of ", count, " parameters, got ", list->size());
  STD_TORCH_CHECK(groups.size() == count, "groups: expected one for each of ", count, " parameters, got ", groups.size());
  check_shape("norms", norms, {-1});
  check_dtype("norms", norms, ScalarType::Float);
  check_contiguous("norms", norms);
  check_device("norms", norms, parameters[0]);
  check_device("learning_rate", learning_rate, parameters[0]);
  STD_TORCH_CHECK(max_norm > 0, "max_norm: expected a number above 0, got ", max_norm);
  for (const auto& [name, beta] : {std::pair{"beta1", beta1}, {"beta2", beta2}})
    STD_TORCH_CHECK(beta >= 0 && beta < 1, name, ": expected 0 <= ", name, " < 1, got ", beta);
  STD_TORCH_CHECK(epsilon >= 0 && std::isfinite(epsilon), "epsilon: expected a number of at least 0, got ", epsilon);
  float& rate = scalar("learning_rate", learning_rate);
  if (kl) check_device("kl", *kl, parameters[0]);
  const float divergence = kl ? scalar("kl", *kl) : 0;
  const size_t expected = kl ? 5 : 0;
  STD_TORCH_CHECK(schedule.size() == expected, "schedule: expected ", expected, " numbers, got ", schedule.size());
  std::vector<Piece> pieces;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& parameter = parameters[i];
    for (const auto& [name, x] : {std::pair{"parameters", &parameter}, {"grads", &grads[i]}, {"exp_avgs", &exp_avgs[i]},
                                  {"exp_avg_sqs", &exp_avg_sqs[i]}}) {
      check_dtype(name, *x, ScalarType::Float);
      check_contiguous(name, *x);
      check_device(name, *x, parameters[0]);
      bool same = x->dim() == parameter.dim();
      for (int64_t d = 0; same && d < x->dim(); ++d) same = x->size(d) == parameter.size(d);
      STD_TORCH_CHECK(same, name, ": expected shape ", shape_of(parameter), ", got ", shape_of(*x));
    }
    check_device("steps", steps[i], parameters[0]);
    scalar("steps", steps[i]);
    check_range("groups", groups[i], 0, norms.size(0));
    const int64_t size = parameter.numel();
    for (int64_t at = 0; at < size; at += kPiece) {
      auto from = [&](const Tensor& x) { return static_cast<float*>(x.data_ptr()) + at; };
      pieces.push_back({from(parameter), from(exp_avgs[i]), from(exp_avg_sqs[i]), from(grads[i]),
                        std::min(kPiece, size - at), static_cast<int64_t>(i), 0});
    }
  }
  check_all_apart({{"parameters", &parameters}, {"grads", &grads}, {"exp_avgs", &exp_avgs},
                   {"exp_avg_sqs", &exp_avg_sqs}, {"steps", &steps}}, norms, learning_rate, kl);
  if (kl) rate = adapted(rate, divergence, schedule);
  const auto num_pieces = static_cast<int64_t>(pieces.size());
  int64_t elements = 0;
  for (const Piece& piece : pieces) elements += piece.size;
  const int64_t grain = elements > kGrain * kPiece ? kGrain : num_pieces;  // biases are pieces too
  torch::stable::parallel_for(0, num_pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) pieces[p].squares = sum_of_squares(pieces[p].grad, pieces[p].size);
  });
  std::vector<double> totals(norms.size(0));
  for (const Piece& piece : pieces) totals[groups[piece.index]] += piece.squares;
  auto* results = static_cast<float*>(norms.data_ptr());
  for (size_t g = 0; g < totals.size(); ++g) results[g] = static_cast<float>(std::sqrt(totals[g]));
  std::vector<Rates> rates(count);
  for (size_t i = 0; i < count; ++i) {
    float& step = scalar("steps", steps[i]);
    step += 1;
    const double shorter = max_norm / (std::sqrt(totals[groups[i]]) + kNormEpsilon);
    rates[i] = {static_cast<float>(1 - beta1), static_cast<float>(beta2), static_cast<float>(1 - beta2),
                static_cast<float>(epsilon),
                // A NaN norm makes the whole group NaN, as in torch, so that it cannot go unnoticed.
                shorter >= 1 || std::isinf(max_norm) ? 1.0f : static_cast<float>(shorter),
                static_cast<float>(rate / (1 - std::pow(beta1, static_cast<double>(step)))),
                static_cast<float>(std::sqrt(1 - std::pow(beta2, static_cast<double>(step))))};
  }
  torch::stable::parallel_for(0, num_pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const Piece& x = pieces[p];
      update(x.parameter, x.exp_avg, x.exp_avg_sq, x.grad, x.size, rates[x.index]);
    }
  });
}

}  // namespace pydrone
