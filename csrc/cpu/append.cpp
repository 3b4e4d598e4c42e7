// Stores one step on the CPU: its row (append_rows.cpp), its planes, and how it ended.
//
// An append is first planned from dtypes, shapes and strides, then launched on addresses. PyTorch's dispatcher takes
// longer than a step of 256 environments, so pydrone/ops/prepared.py keeps the plan and launches it on other tensors
// like those.
#include "append.h"

#include "append_rows.h"
#include "common.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace pydrone {
namespace {

// What is the same for all steps whose tensors have these dtypes, shapes and strides: plain numbers, so that they can
// be kept. Addresses are numbered: the memory's tensors, then the sources, then the flags.
struct Plan {
  int64_t capacity, num_envs, row_bytes;
  int64_t num_fields, num_planes, num_finals, num_flags;  // of the sources that follow the plan, in this order
  int64_t codes_env, codes_slot;                          // strides in bytes
  int64_t rollouts;                                       // pools, or numbers of not_finite; 0: neither
  int64_t pool;                                           // address of final_obs; 0: none
  int64_t pool_rows, pool_row_bytes, final_rows_env, final_rows_slot;
  int64_t not_finite;  // its address; 0: none
};
static_assert(std::is_trivially_copyable_v<Plan> && std::is_trivially_copyable_v<Field>);

// The flags: what they are called, at which value they count, and as what.
struct Flag {
  const char* name;
  bool when;
  uint8_t code;
};
constexpr Flag kFlags[] = {{"dones", true, kTerminated}, {"truncated", true, kTruncated}, {"valid", false, kInvalid}};

// A source of one element per environment.
Field plain_field(const Tensor& source) {
  Field field{extent_of(source)};
  field.from = field.to = source.scalar_type();
  field.to_size = field.item;
  field.width = 1;
  return field;
}

Field describe(const char* name, const Tensor& source, const Step::Field& wanted, const Tensor& rows, int64_t num_envs,
               int64_t row_bytes) {
  const auto [offset, dtype, width, dims] = wanted;
  check_source(name, source, wanted, num_envs);
  Field field = plain_field(source);
  field.to = static_cast<ScalarType>(dtype);
  field.to_size = item_size(name, dtype);
  const auto sizes = source.sizes(), strides = source.strides();
  field.offset = offset;
  field.width = width;
  STD_TORCH_CHECK(offset % field.to_size == 0, name, ": byte offset ", offset, " is not a multiple of ", field.to_size);
  STD_TORCH_CHECK(field.from == field.to || (is_real(field.from) && is_real(field.to)), name, ": expected dtype ",
                  torch::headeronly::toString(field.to), ", got ", torch::headeronly::toString(field.from));
  check_device(name, source, rows);
  // Merge inner dimensions from the last one up; if none is left, each environment's elements are dense.
  int64_t dense = 1;
  bool is_dense = true;
  for (auto i = static_cast<int64_t>(sizes.size()) - 1; i >= 1; --i) {
    const int64_t size = sizes[i], stride = strides[i];
    if (size == 1) continue;
    is_dense = is_dense && stride == dense;
    dense *= size;
    if (field.dims && stride == field.strides[field.dims - 1] * field.sizes[field.dims - 1]) {
      field.sizes[field.dims - 1] *= size;
      continue;
    }
    STD_TORCH_CHECK(field.dims < kInner, name, ": more than ", kInner,
                    " inner dimensions of unrelated strides; pass .contiguous()");
    field.sizes[field.dims] = size;
    field.strides[field.dims++] = stride;
  }
  if (is_dense || field.width == 0) field.dims = 0;
  check_offset(name, offset, field.bytes(), row_bytes);
  return field;
}

// Appends fields in ascending order of offset, whose sources' addresses begin at `address`; the first `looked_at` are
// checked for finite values.
void describe_all(std::vector<Field>& fields, const Step::Sources& sources, const Tensor& rows, int64_t num_envs,
                  int64_t address, int64_t looked_at = 0) {
  const auto begin = static_cast<int64_t>(fields.size());
  const int64_t row_bytes = rows.size(2);
  for (int64_t i = 0; i < sources.count; ++i) {
    Field& field = fields.emplace_back(
        describe(sources.name, sources[i], sources.fields[i], rows, num_envs, row_bytes));
    field.address = address + i;
    field.looked_at = i < looked_at && is_real(field.to);
  }
  auto before = [](const Field& x, const Field& y) { return x.offset < y.offset; };
  if (!std::is_sorted(fields.begin() + begin, fields.end(), before))
    std::sort(fields.begin() + begin, fields.end(), before);
}

// Checks everything about append's arguments that does not depend on addresses, numbers or contents. `fields` receives
// all sources.
Plan make_plan(const Step& step, int64_t num_memory, const Optional& dones, const Optional& truncated,
               const Optional& valid, std::vector<Field>& fields) {
  const Tensor& rows = step.rows;
  Plan plan{};
  plan.capacity = rows.size(0);
  plan.num_envs = rows.size(1);
  plan.row_bytes = rows.size(2);
  plan.num_fields = step.row.count;
  plan.num_planes = step.plane.count;
  const int64_t planes = num_memory + plan.num_fields, finals = planes + plan.num_planes;
  fields.reserve(finals + step.final.count + 3 - num_memory);
  describe_all(fields, step.row, rows, plan.num_envs, num_memory, step.looked_at);
  const bool pooled = step.check_ends(dones, truncated, valid);
  for (int64_t i = 0; i < plan.num_planes; ++i) {
    const Tensor& plane = step.planes[i];
    Field& field = fields.emplace_back(plain_field(step.plane[i]));
    field.address = planes + i;
    field.to = ScalarType::Float;
    field.to_env = 4 * plane.stride(0);
    field.to_slot = 4 * plane.stride(1);
  }
  // Without a pool only their memory matters: none may be in the step that is written.
  plan.num_finals = step.final.count;
  if (pooled) {
    const Tensor &final_obs = step.pool[0], &final_rows = step.pool[2];
    describe_all(fields, step.final, final_obs, plan.num_envs, finals);
    plan.pool = step.pool - &rows;
    plan.rollouts = final_obs.size(0);
    plan.pool_rows = final_obs.size(1);
    plan.pool_row_bytes = final_obs.size(2);
    plan.final_rows_env = 4 * final_rows.stride(0);
    plan.final_rows_slot = 4 * final_rows.stride(1);
  } else {
    for (int64_t i = 0; i < plan.num_finals; ++i)
      fields.emplace_back(plain_field(step.final[i])).address = finals + i;
  }
  if (step.not_finite) {
    const int64_t rollouts = step.not_finite->size(0);
    STD_TORCH_CHECK(!pooled || rollouts == plan.rollouts, "not_finite: expected ", plan.rollouts,
                    " rollouts as final_obs has, got ", rollouts);
    plan.not_finite = step.not_finite - &rows;
    plan.rollouts = rollouts;
  }
  if (!dones) return plan;
  plan.codes_env = step.codes->stride(0);
  plan.codes_slot = step.codes->stride(1);
  int64_t address = finals + plan.num_finals;
  const Optional* const flags[] = {&dones, &truncated, &valid};
  for (int64_t i = 0; i < 3; ++i) {
    if (!flags[i]->has_value()) continue;
    Field& field = fields.emplace_back(plain_field(**flags[i]));
    field.address = address++;
    field.offset = i;  // in kFlags
    ++plan.num_flags;
  }
  return plan;
}

void copy_plane(char* to, const Field& source, int64_t num_envs) {
  for_real("sources of planes", source.from, [&](auto kind) {
    using From = decltype(kind);
    if constexpr (std::is_same_v<float, From>)
      if (source.to_env == 4 && source.env == 4) return stream(to, source.data, num_envs * 4);
    const char* from = source.data;
    for (int64_t n = 0; n < num_envs; ++n, to += source.to_env, from += source.env)
      *reinterpret_cast<float*>(to) = convert<float>(*reinterpret_cast<const From*>(from));
  });
}

// codes[i] = the flag's code where the flag of environment n0 + i, as a bool, is as it says.
void mark(uint8_t* codes, const Flag& flag, const Field& source, int64_t n0, int64_t envs) {
  const bool when = flag.when;  // read once: for all the compiler knows, codes may be a flag's memory
  const uint8_t code = flag.code;
  for_flag(flag.name, source.from, [&](auto kind) {
    using From = decltype(kind);
    const char* const data = source.data + n0 * source.env;
    if (source.env == sizeof(From)) {
      const auto* const from = reinterpret_cast<const From*>(data);
      for (int64_t i = 0; i < envs; ++i) codes[i] = nonzero(from[i]) == when ? code : codes[i];
    } else {
      for (int64_t i = 0; i < envs; ++i)
        codes[i] = nonzero(*reinterpret_cast<const From*>(data + i * source.env)) == when ? code : codes[i];
    }
  });
}

// The pool that a rollout's final observations go to.
struct Pool {
  char* rows;
  int64_t size, row_bytes;
  int32_t* count;  // rows requested, truncations without a final observation
  char* numbers;   // int32, for this step: each environment's row in the pool
  int64_t numbers_env;
  const Field* fields;
  int64_t num_fields;

  // Stores one environment's final observation, if the pool has room.
  void take(int64_t env) const {
    auto& number = *reinterpret_cast<int32_t*>(numbers + env * numbers_env);
    number = -1;
    if (!num_fields) {
      ++count[1];
      return;
    }
    const int32_t place = count[0];
    if (count[0] < std::numeric_limits<int32_t>::max()) ++count[0];
    if (place >= size) return;
    for (int64_t i = 0; i < num_fields; ++i)
      copy_general(fields[i], rows + place * row_bytes, row_bytes, env, 1);
    number = place;
  }
};

// `flags`: sources of dones, and of what else is given.
void store_ends(uint8_t* to, int64_t stride, int64_t num_envs, const Field* flags, int64_t num_flags,
                const Pool* pool) {
  constexpr int64_t kBatch = 1024;
  alignas(64) uint8_t batch[kBatch];
  for (int64_t n0 = 0; n0 < num_envs; n0 += kBatch) {
    const int64_t envs = std::min(kBatch, num_envs - n0);
    std::memset(batch, kRunning, envs);
    for (int64_t i = 0; i < num_flags; ++i) mark(batch, kFlags[flags[i].offset], flags[i], n0, envs);
    if (stride == 1)
      std::memcpy(to + n0, batch, envs);
    else
      for (int64_t i = 0; i < envs; ++i) to[(n0 + i) * stride] = batch[i];
    if (!pool || !std::memchr(batch, kTruncated, envs)) continue;
    for (int64_t i = 0; i < envs; ++i)
      if (batch[i] == kTruncated) pool->take(n0 + i);
  }
}

// A plan on addresses: the constructor checks what a plan does not know, and the call writes.
class Launch {
 public:
  Launch(const Plan& plan, std::vector<Field> sources, char* const* addresses, int64_t slot, int64_t pool_slot)
      : plan_(plan), sources_(std::move(sources)) {
    check_range("slot", slot, 0, plan.capacity);
    if (plan.rollouts) check_range("pool_slot", pool_slot, 0, plan.rollouts);
    for (Field& source : sources_) source.data = addresses[source.address];
    planes_ = plan.num_fields;
    finals_ = planes_ + plan.num_planes;
    flags_ = finals_ + plan.num_finals;
    const int64_t bytes = plan.num_envs * plan.row_bytes;
    row_ = addresses[0] + slot * bytes;
    Written written(addresses[0], plan.num_fields ? bytes : 0, slot, plan.num_planes);
    for (int64_t i = 0; i < plan.num_planes; ++i) {
      const Field& plane = sources_[planes_ + i];
      planes_at_.push_back(addresses[kPlanes + i] + slot * plane.to_slot);
      written.add(addresses[kPlanes + i], plane.to_env, plane.to_slot, plan.num_envs);
    }
    for (int64_t i = 0; i < flags_; ++i) {
      const bool plane = i >= planes_ && i < finals_;
      written.check_apart(i < planes_ ? "sources" : plane ? "sources of planes" : "final sources", sources_[i],
                          plane ? i - planes_ : -1);
    }
    if (plan.num_flags) codes_ = reinterpret_cast<uint8_t*>(addresses[kCodes]) + slot * plan.codes_slot;
    if (plan.not_finite) not_finite_ = reinterpret_cast<int32_t*>(addresses[plan.not_finite]) + pool_slot;
    if (!plan.pool) return;
    auto* const counts = reinterpret_cast<int32_t*>(addresses[plan.pool + 1]);
    for (int64_t i = 0; i < 2 * plan.rollouts; ++i)
      STD_TORCH_CHECK(counts[i] >= 0, "count: expected counts of at least 0, got ", counts[i]);
    pool_.size = plan.pool_rows;
    pool_.row_bytes = plan.pool_row_bytes;
    pool_.rows = addresses[plan.pool] + pool_slot * pool_.size * pool_.row_bytes;
    pool_.count = counts + 2 * pool_slot;
    pool_.numbers = addresses[plan.pool + 2] + slot * plan.final_rows_slot;
    pool_.numbers_env = plan.final_rows_env;
    pool_.num_fields = plan.num_finals;
  }

  void operator()() {
    const int64_t num_envs = plan_.num_envs;
    const Field* const sources = sources_.data();
    if (num_envs && plan_.row_bytes && plan_.num_fields &&
        append_rows(row_, plan_.row_bytes, sources, plan_.num_fields, num_envs) && not_finite_)
      *not_finite_ = 1;
    for (int64_t i = 0; i < plan_.num_planes; ++i) copy_plane(planes_at_[i], sources[planes_ + i], num_envs);
    pool_.fields = sources + finals_;
    if (codes_)
      store_ends(codes_, plan_.codes_env, num_envs, sources + flags_, plan_.num_flags, plan_.pool ? &pool_ : nullptr);
    stream_fence();
  }

 private:
  static constexpr int64_t kCodes = 1, kPlanes = 2;  // their places in the memory

  Plan plan_;
  std::vector<Field> sources_;
  int64_t planes_, finals_, flags_;  // where these sources begin
  char* row_;
  std::vector<char*> planes_at_;
  uint8_t* codes_ = nullptr;
  int32_t* not_finite_ = nullptr;
  Pool pool_{};
};

}  // namespace

std::function<void()> checked_append(const std::vector<Tensor>& memory, const std::vector<Tensor>& sources,
                                     const Tensor& layout, const Optional& dones, const Optional& truncated,
                                     const Optional& valid, int64_t slot, int64_t pool_slot, const Optional& cursor,
                                     bool commit) {
  const Step step(memory, sources, layout);
  std::vector<Field> fields;
  const Plan plan = make_plan(step, memory.size(), dones, truncated, valid, fields);
  int64_t* state = nullptr;
  if (cursor) {
    check_cursor(cursor, step.rows);
    STD_TORCH_CHECK(plan.capacity > 0, "rows: expected a capacity of at least 1, got 0");
    state = static_cast<int64_t*>(cursor->data_ptr());
    if (state[0] - state[1] >= plan.capacity) return [state] { state[2] = 1; };
    slot = state[0] % plan.capacity;
    if (plan.rollouts) pool_slot = state[0] / std::max<int64_t>(state[4], 1) % plan.rollouts;
  }
  std::vector<char*> addresses;
  addresses.reserve(memory.size() + fields.size());
  for (const Tensor& x : memory) addresses.push_back(static_cast<char*>(x.data_ptr()));
  for (const Tensor& x : sources) addresses.push_back(static_cast<char*>(x.data_ptr()));
  for (const Optional* flags : {&dones, &truncated, &valid})
    if (flags->has_value()) addresses.push_back(static_cast<char*>((*flags)->data_ptr()));
  return [launch = Launch(plan, std::move(fields), addresses.data(), slot, pool_slot), state, commit]() mutable {
    launch();
    if (state && commit) ++state[0];
  };
}

void append(const std::vector<Tensor>& memory, const std::vector<Tensor>& sources, const Tensor& layout,
            const Optional& dones, const Optional& truncated, const Optional& valid, int64_t slot, int64_t pool_slot,
            const Optional& cursor, bool commit) {
  checked_append(memory, sources, layout, dones, truncated, valid, slot, pool_slot, cursor, commit)();
}

Tensor append_plan(const std::vector<Tensor>& memory, const std::vector<Tensor>& sources, const Tensor& layout,
                   const Optional& dones, const Optional& truncated, const Optional& valid,
                   const std::vector<int64_t>& places) {
  std::vector<Field> fields;
  const auto num_memory = static_cast<int64_t>(memory.size()), given = static_cast<int64_t>(places.size());
  const Plan plan = make_plan(Step(memory, sources, layout), num_memory, dones, truncated, valid, fields);
  STD_TORCH_CHECK(given == static_cast<int64_t>(fields.size()), "places: expected ", fields.size(),
                  ", one for each source and flag, got ", given);
  for (Field& field : fields) {
    const int64_t place = places[field.address - num_memory];
    check_range("places", place, 0, given);
    field.address = num_memory + place;
  }
  constexpr size_t kWord = sizeof(int64_t);
  static_assert(sizeof(Plan) % kWord == 0 && sizeof(Field) % kWord == 0);
  const size_t bytes = fields.size() * sizeof(Field);
  Tensor kept = torch::stable::new_empty(layout, {static_cast<int64_t>((sizeof(Plan) + bytes) / kWord)});
  auto* const to = static_cast<char*>(kept.data_ptr());
  std::memcpy(to, &plan, sizeof(Plan));
  std::memcpy(to + sizeof(Plan), fields.data(), bytes);
  return kept;
}

}  // namespace pydrone

// Launches a plan of append_plan. call: slot, pool_slot, then the addresses. Returns 0; or 1, and has written nothing,
// where append would raise an error.
extern "C" __attribute__((visibility("default"))) int32_t pydrone_append(const char* kept, const int64_t* call) {
  using namespace pydrone;
  try {
    const auto& plan = *reinterpret_cast<const Plan*>(kept);
    const auto* const sources = reinterpret_cast<const Field*>(kept + sizeof(Plan));
    const int64_t count = plan.num_fields + plan.num_planes + plan.num_finals + plan.num_flags;
    Launch(plan, {sources, sources + count}, reinterpret_cast<char* const*>(call + 2), call[0], call[1])();
    return 0;
  } catch (...) {
    return 1;
  }
}
