// How errors are raised, by our checks and by those in torch's headers: include this before any header of torch's.
//
// torch's macros build their messages with std::ostringstream. A library that holds a copy of libstdc++ (linked with
// -static-libstdc++) shares some of its symbols with the process's copy; streams of one then meet locales of the other,
// which cuts messages off or crashes. Strings and exceptions do not depend on such global objects, so nothing here is a
// stream.
#pragma once

#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace pydrone {

template <class T>
std::string text_of(const T& x) {
  if constexpr (std::is_floating_point_v<T>) {
    char digits[32];
    std::snprintf(digits, sizeof(digits), "%g", static_cast<double>(x));
    for (char& c : digits)
      if (c == ',') c = '.';  // the decimal point of some locales
    return digits;
  } else if constexpr (std::is_integral_v<T>) {
    return std::to_string(x);
  } else {
    return x;
  }
}

template <class... Parts>
[[noreturn]] __attribute__((noinline)) void fail(const Parts&... parts) {
  std::string message;
  ((message += text_of(parts)), ...);
  throw std::runtime_error(message);
}

}  // namespace pydrone

#undef STD_TORCH_CHECK
#define STD_TORCH_CHECK(condition, ...)           \
  if (C10_UNLIKELY_OR_CONST(!(condition))) {      \
    pydrone::fail(__VA_ARGS__);                   \
  }

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call)                                   \
  if ((call) != TORCH_SUCCESS) {                                       \
    pydrone::fail(#call " failed, called at " __FILE__);               \
  }
