// The CPU kernels on several std::threads, for ThreadSanitizer, which cannot follow torch's own threads: the sources of
// csrc/cpu, unchanged, with the replacements of torch's headers beside this file. It does not load torch.
//
// Sizes are such that every parallel loop is split. Run with an argument, two threads write to the same memory, to show
// that a race is detected. The printed sums show that something was computed; on every processor they are the same up
// to rounding. (No input is created among the arguments of a call, whose order of evaluation the compiler chooses.)
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
#include <deque>
#include <optional>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

namespace pydrone {
void gae(const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&, const Tensor&, const Optional&,
         const Optional&, double, double, int64_t, bool, int64_t, const Optional&, const Tensor&, const Optional&,
         const Optional&, const Optional&);
void gather(const Tensor&, const std::vector<int64_t>&, const std::vector<int64_t>&, const std::vector<Tensor>&, int64_t,
            const Optional&, const Optional&, const Optional&, const Optional&, int64_t, int64_t, int64_t, int64_t,
            int64_t, int64_t, bool, int64_t, const Optional&, const Optional&, const Optional&, const Optional&);
void ppo_gradients(const std::vector<Tensor>&, const std::vector<Tensor>&, const Tensor&, const Tensor&, const Tensor&,
                   const Optional&, const Tensor&, const Optional&, const Optional&, const std::vector<Tensor>&,
                   const std::vector<Tensor>&, const Optional&, int64_t, int64_t, double, double, double, double,
                   const Optional&, const Optional&, const Optional&, const Optional&, double, const Optional&,
                   const Optional&, const std::vector<Tensor>&, const Tensor&, const std::vector<int64_t>&,
                   const Optional&, const Optional&, const Optional&, const std::vector<int64_t>&, bool);
void ppo_act(const std::vector<Tensor>&, const std::vector<Tensor>&, const Tensor&, const std::vector<Tensor>&,
             const std::vector<Tensor>&, const Optional&, int64_t, int64_t, const Optional&, const Optional&,
             const Optional&, const Optional&, double, const Optional&, const Optional&, const Optional&, const Tensor&,
             const Tensor&, const Tensor&, const Tensor&, const std::vector<int64_t>&);
void clipped_adam(const std::vector<Tensor>&, const std::vector<Tensor>&, const std::vector<Tensor>&,
                  const std::vector<Tensor>&, const std::vector<Tensor>&, const std::vector<int64_t>&, double,
                  const Tensor&, double, double, double, const Tensor&, const Optional&, const std::vector<double>&);
}  // namespace pydrone

namespace {

std::deque<std::vector<char>> memory;  // of all tensors
std::mt19937 generator(0);

template <class T>
constexpr ScalarType type_of() {
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
  if constexpr (std::is_same_v<T, int32_t>) return ScalarType::Int;
  return ScalarType::Byte;
}

// Random numbers in [0, most); `columns`: the first dimension is contiguous.
template <class T>
Tensor make(std::vector<int64_t> sizes, double most = 0, bool columns = false) {
  int64_t count = 1;
  std::vector<int64_t> strides(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    const size_t d = columns ? i : sizes.size() - 1 - i;
    strides[d] = count;
    count *= sizes[d];
  }
  memory.emplace_back(count * sizeof(T) + 64);
  char* data = memory.back().data();
  data += (64 - reinterpret_cast<uintptr_t>(data) % 64) % 64;
  for (int64_t i = 0; i < count; ++i)
    reinterpret_cast<T*>(data)[i] = static_cast<T>(most * std::generate_canonical<double, 32>(generator));
  return Tensor(data, type_of<T>(), sizeof(T), std::move(sizes), std::move(strides));
}

double sum(const Tensor& x) {
  double total = 0;
  for (int64_t i = 0; i < x.numel(); ++i)
    total += x.scalar_type() == ScalarType::Float ? static_cast<float*>(x.data_ptr())[i]
                                                  : static_cast<double*>(x.data_ptr())[i];
  return total;
}

// A scan of two layouts: with planes used in place, and through tiles; with statistics and a pool of final values.
template <class T>
void run_gae(int64_t num_envs, int64_t num_steps, bool columns, bool pooled) {
  const Tensor rewards = make<T>({num_envs, num_steps}, 1, columns), values = make<T>({num_envs, num_steps}, 1, columns);
  const Tensor codes = make<uint8_t>({num_envs, num_steps}, 4, columns), last = make<T>({num_envs}, 1);
  const Tensor advantages = make<T>({num_envs, num_steps}, 0, columns);
  const Tensor returns = make<T>({num_envs, num_steps}, 0, columns), stats = make<double>({3});
  const Tensor workspace = make<double>({3 * ((num_envs + 3) / 4) + 1});
  Optional final_values, final_rows;
  if (pooled) final_values = make<T>({50}, 1), final_rows = make<int32_t>({num_envs, num_steps}, 50, columns);
  pydrone::gae(rewards, values, codes, {}, {}, last, final_values, final_rows, 0.99, 0.95, num_steps / 2, true,
               pooled ? 1 : 3, {}, advantages, returns, stats, workspace);
  std::printf("gae %lld x %lld: %.6g\n", (long long)num_envs, (long long)num_steps, sum(advantages) + sum(stats));
}

void run_gather(int64_t num_envs, int64_t num_steps, int64_t row_bytes, bool shuffle) {
  const Tensor rows = make<uint8_t>({num_steps, num_envs, row_bytes}), advantages = make<float>({num_envs, num_steps}, 1);
  const Tensor stats = make<double>({3}, 9);
  const int64_t samples = num_envs * num_steps, count = samples - 7, wide = row_bytes / 4 - 1;
  const std::vector<Tensor> outputs = {make<float>({count, wide}), make<float>({count})};
  const Tensor out = make<float>({count}), returns = make<float>({count}), indices = make<int64_t>({count});
  pydrone::gather(rows, {4, 0}, {6, 6}, outputs, 0, advantages, {}, stats, {}, num_steps, num_steps / 3, samples, 1, 2, 3,
                  shuffle, 5, {}, out, returns, indices);
  std::printf("gather %lld x %lld, rows of %lld: %.6g\n", (long long)num_envs, (long long)num_steps,
              (long long)row_bytes, sum(out) + sum(returns));
}

// Weights and biases for two hidden layers, or tensors of the same shapes.
std::vector<Tensor> network(int64_t inputs, int64_t width, int64_t outputs, double most) {
  return {make<float>({width, inputs}, most), make<float>({width}, most), make<float>({width, width}, most),
          make<float>({width}, most), make<float>({outputs, width}, most), make<float>({outputs}, most)};
}

// Adds 0.5, for a standard deviation.
Tensor raised(const Tensor& x) {
  for (int64_t i = 0; i < x.numel(); ++i) static_cast<float*>(x.data_ptr())[i] += 0.5f;
  return x;
}

// A policy with 17 observations and 4 actions, and memory for its gradients.
struct Policy {
  std::vector<Tensor> actor, critic, grads;
  Tensor std = raised(make<float>({4}, 1)), metrics = make<float>({6});

  explicit Policy(int64_t width)
      : actor(network(17, width, 4, 0.1)), critic(network(17, width, 1, 0.1)), grads(network(17, width, 4, 0)) {
    const std::vector<Tensor> more = network(17, width, 1, 0);
    grads.insert(grads.end(), more.begin(), more.end());
    grads.push_back(make<float>({4}));
  }
  double found() const { return sum(grads[0]) + sum(grads[6]) + sum(metrics); }
};

void run_ppo(int64_t samples, int64_t width, int64_t activation) {
  const Policy x(width);
  const Tensor mu = make<float>({samples, 4}, 1), sigma = raised(make<float>({samples, 4}, 1));
  const Tensor obs = make<float>({samples, 17}, 1), actions = make<float>({samples, 4}, 1);
  const Tensor log_probs = make<float>({samples}, 1), advantages = make<float>({samples}, 1);
  const Tensor returns = make<float>({samples}, 1), values = make<float>({samples}, 1);
  pydrone::ppo_gradients({obs}, {}, actions, log_probs, advantages, returns, values, mu, sigma, x.actor, x.critic, x.std,
                         activation, 0, 0.2, 0.2, 1, 0.01, {}, {}, {}, {}, 10, {}, {}, x.grads, x.metrics, {}, {}, {}, {}, {},
                         true);
  std::printf("ppo %lld: %.6g\n", (long long)samples, x.found());
}

// The same, drawn from a ring, in which the rollout begins at the last slot.
void run_drawn(int64_t num_envs, int64_t num_steps, bool shuffle) {
  constexpr int64_t kRow = 32;
  const Policy x(33);
  const int64_t capacity = num_steps + 2, samples = num_envs * num_steps;
  const Tensor rows = raised(make<float>({capacity, num_envs, kRow}, 1));
  const Tensor advantages = make<float>({num_envs, num_steps}, 1), stats = make<double>({3}, 9);
  static_cast<double*>(stats.data_ptr())[0] = static_cast<double>(samples);
  auto field = [&](int64_t at, std::vector<int64_t> width) {
    std::vector<int64_t> sizes{capacity, num_envs}, strides{num_envs * kRow, kRow};
    if (!width.empty()) sizes.push_back(width[0]), strides.push_back(1);
    auto* const data = static_cast<float*>(rows.data_ptr()) + at;
    return Tensor(data, ScalarType::Float, 4, std::move(sizes), std::move(strides));
  };
  const std::vector<int64_t> drawn = {num_steps, capacity - 1, samples, 1, 2, 3, shuffle, 5, samples - 7};
  pydrone::ppo_gradients({field(0, {9}), field(9, {8})}, {}, field(17, {4}), field(21, {}), advantages, {},
                         field(22, {}), field(23, {4}), field(27, {4}), x.actor, x.critic, x.std, 0, 0, 0.2, 0.2, 1,
                         0.01, {}, {}, {}, {}, 10, {}, {}, x.grads, x.metrics, drawn, stats, {}, {}, {}, true);
  std::printf("ppo in the ring %lld x %lld: %.6g\n", (long long)num_envs, (long long)num_steps, x.found());
}

// With kept packed weights, runs twice: the first call packs, the second uses what was packed.
void run_act(int64_t num_envs, int64_t width, bool packed) {
  const Policy x(width);
  const Tensor obs = make<float>({num_envs, 17}, 1), noise = make<float>({num_envs, 4}, 1);
  const Tensor actions = make<float>({num_envs, 4}), mean = make<float>({num_envs, 4});
  const Tensor log_probs = make<float>({num_envs}), values = make<float>({num_envs});
  Optional kept;
  if (packed) kept = make<float>({8 * (width + 16) * (width + 32)});
  for (int64_t i = 0; i < (packed ? 2 : 1); ++i)
    pydrone::ppo_act({obs}, {}, noise, x.actor, x.critic, x.std, 0, 0, {}, {}, {}, {}, 10, {}, {}, kept, actions,
                     log_probs, values, mean, {});
  std::printf("act %lld: %.6g\n", (long long)num_envs, sum(actions) + sum(log_probs) + sum(values) + sum(mean));
}

void run_adam(int64_t width) {
  const std::vector<Tensor> parameters = network(17, width, 4, 1), norms = {make<float>({2})};
  const std::vector<Tensor> grads = network(17, width, 4, 1), exp_avgs = network(17, width, 4, 1);
  const std::vector<Tensor> exp_avg_sqs = network(17, width, 4, 1);
  const Tensor learning_rate = make<float>({}, 1);
  std::vector<Tensor> steps;
  for (size_t i = 0; i < parameters.size(); ++i) steps.push_back(make<float>({}));
  pydrone::clipped_adam(parameters, grads, exp_avgs, exp_avg_sqs, steps, {0, 0, 0, 0, 1, 1}, 0.5, learning_rate, 0.9,
                        0.999, 1e-8, norms[0], {}, {});
  std::printf("adam %lld: %.6g\n", (long long)width, sum(parameters[2]) + sum(norms[0]));
}

}  // namespace

int main(int argc, char**) {
  if (argc > 1) {
    const Tensor from = make<float>({4096, 100}, 1, true), to = make<float>({4096, 100}, 0, true);
    const Tensor last = make<float>({4096});
    const auto scan = [&] {
      pydrone::gae(from, from, from, {}, {}, last, {}, {}, 0.9, 0.9, 0, false, 0, {}, to, {}, {}, {});
    };
    std::thread other(scan);
    scan();
    other.join();
    return 0;
  }
  for (const bool columns : {true, false})
    for (const bool pooled : {true, false}) {
      run_gae<float>(8192, 100, columns, pooled);
      run_gae<double>(4099, 129, columns, pooled);
    }
  for (const bool shuffle : {true, false}) {
    run_gather(4096, 100, 96, shuffle);   // with streaming stores
    run_gather(301, 17, 64, shuffle);     // without
    run_gather(999, 7, 1024, shuffle);
  }
  for (const int64_t activation : {0, 1, 2, 3}) run_ppo(4099, 33, activation);
  run_ppo(130, 128, 0);
  for (const bool shuffle : {true, false}) {
    run_drawn(301, 17, shuffle);
    run_drawn(67, 2, shuffle);  // fewer tiles than threads
  }
  for (const bool packed : {true, false}) {
    run_act(1031, 33, packed);
    run_act(130, 128, packed);
  }
  run_adam(512);
  return 0;
}
