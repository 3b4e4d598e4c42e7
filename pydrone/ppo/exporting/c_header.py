"""A policy as one C99 header, for flight controllers: no heap, nothing but math.h, usable from C++ too.

What the functions compute is :func:`pydrone.ppo.exporting.layers.run`. The weights of four outputs lie side by side, so
that the inner loop keeps four independent sums and reads memory in order; the last four are filled up with zeros.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pydrone._version import __version__
from pydrone.ppo.exporting import ExportError
from pydrone.ppo.exporting.layers import CELLS, Layers, memory_size

WIDTH = 120
WEIGHTS = ("float32", "float16")
# Relative to the largest action, but at least absolute: what another processor's math library and fused products may
# change. The export itself is checked more closely.
SELF_TEST_TOLERANCE = 1e-5


class Vectors(NamedTuple):
    """The embedded test: K calls in a row, a recurrent policy's from its reset on."""

    obs: Tensor
    """[K, O] float32."""
    actions: Tensor
    """[K, A] float32; discrete: int64 [K]."""


class Header(NamedTuple):
    """What the header says besides the layers."""

    prefix: str
    weights: str
    """What the matrices are stored as, one of WEIGHTS; they have been rounded to it."""
    contract: str
    """Lines on the observations, the actions and the rate."""
    notes: tuple[str, ...]
    """Further paragraphs of the comment."""
    vectors: Vectors
    step: float | None
    """Seconds from call to call, where known."""


def check_prefix(prefix: str) -> str:
    """``prefix``, which begins every name in the header. ValueError where it cannot."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", prefix):
        raise ValueError(
            f"prefix: expected a letter and then letters, digits and underscores, as in C's names, got {prefix!r}"
        )
    return prefix


def source(layers: Layers, tensors: Mapping[str, Tensor], described: Mapping[str, str], head: Header) -> str:
    """The header's text, ASCII. ``described``: the policy's metadata, of which the comment names env and iteration."""
    body = _Body(layers, tensors, head)
    names = {"P": head.prefix, "PP": head.prefix.upper(), "T": "int16_t" if body.half else "float"}
    code = "\n\n".join(
        [
            _comment(described, head, body),
            "#ifndef @PP@_POLICY_H\n#define @PP@_POLICY_H",
            "#include <math.h>" + ("\n#include <stdint.h>" if body.half else ""),
            "\n".join(body.constants()),
            *body.arrays,
            *(_FUNCTIONS[name].strip() for name in _FUNCTIONS if name in body.used),
            body.memory(),
            body.act(),
            body.self_test(),
            "#endif",
        ]
    )
    code = re.sub(r"\n\n\n+", "\n\n", code)
    code = code.replace("@W@", "@P@_half") if body.half else re.sub(r"@W@\((.*?)\)", r"\1", code)
    return re.sub("@(PP|P|T)@", lambda found: names[found[1]], code) + "\n"


class _Body:
    """The layers as C."""

    def __init__(self, layers: Layers, tensors: Mapping[str, Tensor], head: Header) -> None:
        self.head, self.half = head, head.weights == "float16"
        self.arrays: list[str] = []
        self.used: set[str] = {"half"} if self.half else set()
        self.products = 0
        self.state = memory_size(layers, tensors)
        self.discrete = any(operation == "argmax" for operation, *_ in layers)
        self._lines: list[str] = []
        self._now, self._next = "x", "y"
        self._widest, self.num_obs, width = 0, 0, 0
        for number, (operation, *arguments) in enumerate(layers):
            given = [tensors[name] if isinstance(name, str) else name for name in arguments]
            if not width:
                width = self.num_obs = given[0].shape[-1]
                self._widest = width
                self._lines.append(f"for (i = 0; i < {width}; ++i) x[i] = obs[i];")
            width = self._add(operation, given, number, width)
        self.num_actions = width

    def _add(self, operation: str, given: list, number: int, width: int) -> int:
        """The code of a layer; returns how many numbers come out of it."""
        x, each = self._now, f"for (i = 0; i < {width}; ++i) {self._now}[i]"
        if operation == "linear":
            weight, bias = self._matrix(*given, number)
            outputs = given[0].shape[0]
            self._lines.append(f"@P@_linear({weight}, {bias}, {x}, {self._next}, {width}, {outputs});")
            self._now, self._next, self._widest = self._next, x, max(self._widest, _padded(outputs))
            return outputs
        if operation in CELLS:
            self._cell(operation, given, number, width)
            return given[1].shape[1]
        if operation == "normalize":
            names = [self._vector(f"{name}_{number}", values) for name, values in zip(("shift", "std"), given)]
            self._lines.append(f"{each} = ({x}[i] - {names[0]}[i]) / {names[1]}[i];")
        elif operation == "clip":
            bounds = [
                f"{self._vector(f'{name}_{number}', bound)}[i]" if isinstance(bound, Tensor) else _number(bound)
                for name, bound in zip(("low", "high"), given)
            ]
            self.used.add("clip")
            self._lines.append(f"{each} = @P@_clip({x}[i], {', '.join(bounds)});")
        elif operation in _ACTIVATIONS:
            function = _ACTIVATIONS[operation]
            self.used.add(function)
            name = function if function in ("tanhf", "truncf") else f"@P@_{function}"
            self._lines.append(f"{each} = {name}({x}[i]);")
        elif operation == "argmax":
            if given:
                raise ExportError(
                    f"policy: expected one choice an action for a C header, got {len(given)}; other formats hold them"
                )
            self._lines.append(f"for (i = 1; i < {width}; ++i) if ({x}[i] > {x}[best]) best = i;")
            self._lines.append("return best;")
        elif operation == "shift":
            self._lines[-1] = f"return best + {int(given[0])};"
        else:
            raise ExportError(f"policy: expected layers that C can compute, got {operation!r}")
        return width

    def _cell(self, kind: str, weights: list[Tensor], number: int, width: int) -> None:
        units, gates = weights[1].shape[1], weights[0].shape[0]
        names = [
            self._matrix(weight, bias, f"{name}_{number}")
            for name, weight, bias in (("ih", weights[0], weights[2]), ("hh", weights[1], weights[3]))
        ]
        self.used.add("sigmoid")
        size = _padded(gates)
        self._lines += [
            "{",
            f"  float in[{size}], own[{size}], *const h = memory->state;",
            f"  @P@_linear({names[0][0]}, {names[0][1]}, {self._now}, in, {width}, {gates});",
            f"  @P@_linear({names[1][0]}, {names[1][1]}, h, own, {units}, {gates});",
            f"  for (i = 0; i < {units}; ++i) {{",
            *(f"    {line}" for line in _CELLS[kind].strip().replace("@H@", str(units)).splitlines()),
            f"    {self._now}[i] = h[i];",
            "  }",
            "}",
        ]
        self._widest = max(self._widest, units)

    def _matrix(self, weight: Tensor, bias: Tensor, number: int | str) -> tuple[str, str]:
        """The names of the arrays of a matrix [outputs, inputs], in fours of outputs, and of its bias."""
        self.used.add("linear")
        outputs, inputs = weight.shape
        self.products += outputs * inputs
        filled = torch.zeros(_padded(outputs), inputs)
        filled[:outputs] = weight
        fours = filled.view(-1, 4, inputs).transpose(1, 2).reshape(-1)
        name = f"@P@_weight_{number}"
        if self.half:
            bits = fours.half().view(torch.int16).tolist()
            self.arrays.append(_array("@T@", name, map(str, bits), len(bits)))
        else:
            self.arrays.append(_array("@T@", name, map(_number, fours.tolist()), fours.numel()))
        padded = torch.zeros(_padded(outputs))
        padded[:outputs] = bias
        return name, self._vector(f"bias_{number}", padded)

    def _vector(self, name: str, values: Tensor) -> str:
        self.arrays.append(_array("float", f"@P@_{name}", map(_number, values.tolist()), values.numel()))
        return f"@P@_{name}"

    # ------------------------------------------------------------------------------------------------------- the text

    @property
    def argument(self) -> str:
        return "@P@_memory *memory, " if self.state else ""

    def constants(self) -> list[str]:
        named = {
            "NUM_OBS": self.num_obs,
            "NUM_ACTIONS": self.num_actions,
            "MULTIPLY_ADDS": self.products,
        }
        if self.state:
            named["MEMORY"] = self.state
        lines = [f"#define @PP@_{name} {value}" for name, value in named.items()]
        if self.head.step is not None:
            lines.append(f"#define @PP@_STEP_MICROSECONDS {round(1e6 * self.head.step)}")
        return lines

    def memory(self) -> str:
        if not self.state:
            return ""
        return _MEMORY.strip()

    def act(self) -> str:
        outputs = "" if self.discrete else ", float actions[@PP@_NUM_ACTIONS]"
        size = _padded(self._widest)
        lines = [f"  {line}" for line in self._lines]
        if not self.discrete:
            lines.append(f"  for (i = 0; i < {self.num_actions}; ++i) actions[i] = {self._now}[i];")
        kind, best = ("int", ", best = 0") if self.discrete else ("void", "")
        says = "/* The action for an observation" + (", and the next memory. */" if self.state else ". */")
        return "\n".join(
            [
                says,
                f"static inline {kind} @P@_act({self.argument}const float obs[@PP@_NUM_OBS]{outputs})",
                "{",
                f"  float x[{size}], y[{size}];",
                f"  int i{best};",
                *lines,
                "}",
            ]
        )

    def self_test(self) -> str:
        """The function that runs the test vectors."""
        obs, actions = self.head.vectors
        count = len(obs)
        rows = _rows(obs)
        if self.discrete:
            wanted = f"static const int expected[{count}] = {{{', '.join(map(str, actions.tolist()))}}};"
            check = [f"    if (@P@_act({'&memory, ' if self.state else ''}obs[k]) != expected[k]) return k + 1;"]
            declared = "  int k;"
        else:
            wanted = f"static const float expected[{count}][@PP@_NUM_ACTIONS] = {{\n{_rows(actions)}\n  }};"
            declared = "  float actions[@PP@_NUM_ACTIONS];\n  int k, i;"
            check = [
                "    float scale = 1.0f;",
                f"    @P@_act({'&memory, ' if self.state else ''}obs[k], actions);",
                "    for (i = 0; i < @PP@_NUM_ACTIONS; ++i) if (fabsf(expected[k][i]) > scale) scale = "
                "fabsf(expected[k][i]);",
                "    /* Written so that NaN fails too. */",
                "    for (i = 0; i < @PP@_NUM_ACTIONS; ++i) {",
                f"      if (!(fabsf(actions[i] - expected[k][i]) <= {_number(SELF_TEST_TOLERANCE)} * scale)) "
                "return k + 1;",
                "    }",
            ]
        return "\n".join(
            [
                "/* 0: the test vectors, which the policy itself computed in double precision, come out right here.",
                "   Else the number of the first that does not, from 1. */",
                "static inline int @P@_self_test(void)",
                "{",
                f"  static const float obs[{count}][@PP@_NUM_OBS] = {{\n{rows}\n  }};",
                f"  {wanted}",
                *(["  @P@_memory memory;"] if self.state else []),
                declared,
                *(["  @P@_reset(&memory);"] if self.state else []),
                f"  for (k = 0; k < {count}; ++k) {{",
                *check,
                "  }",
                "  return 0;",
                "}",
            ]
        )


# ------------------------------------------------------------------------------------------------------ pieces of C

_ACTIVATIONS = {"tanh": "tanhf", "trunc": "truncf", "relu": "relu", "elu": "elu", "silu": "silu"}

# In the order that they are written in. A comparison with NaN is false, so NaN passes through, as in torch.
_FUNCTIONS = {
    "half": """
/* The float16 with these bits, which is no infinity and no NaN. Exact for subnormal ones too. */
static inline float @P@_half(int16_t bits)
{
#ifdef __ARM_FP16_FORMAT_IEEE /* -mfp16-format=ieee: the processor converts */
  union { int16_t bits; __fp16 value; } x;
  x.bits = bits;
  return x.value;
#else
  union { int32_t whole; uint32_t bits; float value; } x;
  x.whole = bits;
  x.bits = (x.bits << 13) & 0x8fffffffu; /* the shift leaves the sign in the four highest bits */
  return x.value * 5.192296858534828e33f; /* 2^112: the exponents' biases differ by 112 */
#endif
}
""",
    "linear": """
/* y[j] = bias[j] + the sum over i of weight[j][i] x[i]. Weights of four outputs lie side by side; y and bias have room
   for a multiple of four. */
static inline void @P@_linear(const @T@ *weight, const float *bias, const float *x, float *y, int inputs,
                              int outputs)
{
  int i, j;
  for (j = 0; j < outputs; j += 4) {
    float a = bias[j], b = bias[j + 1], c = bias[j + 2], d = bias[j + 3];
    for (i = 0; i < inputs; ++i, weight += 4) {
      const float xi = x[i];
      a += @W@(weight[0]) * xi;
      b += @W@(weight[1]) * xi;
      c += @W@(weight[2]) * xi;
      d += @W@(weight[3]) * xi;
    }
    y[j] = a;
    y[j + 1] = b;
    y[j + 2] = c;
    y[j + 3] = d;
  }
}
""",
    "clip": """
static inline float @P@_clip(float x, float low, float high)
{
  return x < low ? low : (x > high ? high : x);
}
""",
    "relu": """
static inline float @P@_relu(float x)
{
  return x < 0.0f ? 0.0f : x;
}
""",
    "elu": """
static inline float @P@_elu(float x)
{
  return x > 0.0f ? x : expm1f(x);
}
""",
    "sigmoid": """
static inline float @P@_sigmoid(float x)
{
  return 1.0f / (1.0f + expf(-x));
}
""",
    "silu": """
static inline float @P@_silu(float x)
{
  return x / (1.0f + expf(-x));
}
""",
}

_MEMORY = """
/* What a recurrent policy remembers from call to call, one for each vehicle. */
typedef struct {
  float state[@PP@_MEMORY];
} @P@_memory;

/* The memory at the start of an episode. */
static inline void @P@_reset(@P@_memory *memory)
{
  int i;
  for (i = 0; i < @PP@_MEMORY; ++i) memory->state[i] = 0.0f;
}
"""

# One unit i of @H@; `in` and `own` are the gates' parts of the input and of the memory, in torch's order.
_CELLS = {
    "gru": """
const float r = @P@_sigmoid(in[i] + own[i]);
const float z = @P@_sigmoid(in[@H@ + i] + own[@H@ + i]);
const float n = tanhf(in[2 * @H@ + i] + r * own[2 * @H@ + i]);
h[i] = (1.0f - z) * n + z * h[i];
""",
    # The memory is the output and the cell, side by side.
    "lstm": """
const float input = @P@_sigmoid(in[i] + own[i]);
const float forget = @P@_sigmoid(in[@H@ + i] + own[@H@ + i]);
const float candidate = tanhf(in[2 * @H@ + i] + own[2 * @H@ + i]);
h[@H@ + i] = forget * h[@H@ + i] + input * candidate;
h[i] = @P@_sigmoid(in[3 * @H@ + i] + own[3 * @H@ + i]) * tanhf(h[@H@ + i]);
""",
}


def _padded(size: int) -> int:
    return -(-size // 4) * 4


def _number(x: float) -> str:
    """A constant of type float, which reads back as the same float32."""
    if x in (float("inf"), float("-inf")):
        return "INFINITY" if x > 0 else "-INFINITY"
    text = f"{x:.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def _filled(items: Iterable[str], indent: str) -> str:
    return textwrap.fill(", ".join(items), WIDTH, initial_indent=indent, subsequent_indent=indent)


def _array(kind: str, name: str, items: Iterable[str], size: int) -> str:
    return f"static const {kind} {name}[{size}] = {{\n{_filled(items, '  ')}\n}};"


def _rows(rows: Tensor) -> str:
    return ",\n".join(f"    {{{_filled(map(_number, row.tolist()), '     ').strip()}}}" for row in rows)


def _comment(described: Mapping[str, str], head: Header, body: _Body) -> str:
    """The contract, as a comment."""
    env, iteration = described.get("env"), described.get("iteration")
    origin = "" if env is None else f" It was trained in {env}" + (f", iteration {iteration}." if iteration else ".")
    memory = (
        "Call @P@_reset(&memory) at the start of each flight; every call of @P@_act changes the memory."
        if body.state
        else ""
    )
    result = "int action = @P@_act(" if body.discrete else "@P@_act("
    rest = "obs)" if body.discrete else "obs, actions)"
    usage = f"{result}{'&memory, ' if body.state else ''}{rest}"
    paragraphs = [
        f"The deterministic policy of a training by pydrone {__version__}, with what the environment makes of its "
        f"actions.{origin} Written by a program; changes are lost.",
        f"Include it in one file, call @P@_self_test() once, which returns 0 where all is well, and then {usage}. It "
        f"needs C99 or C++11, math.h{' and stdint.h' if body.half else ''}, no heap and no initialisation. {memory}",
        *head.notes,
        "Observations that are not finite give actions that are not: check them first.",
    ]
    paragraphs = [text.replace("@P@", head.prefix).strip() for text in paragraphs if text]
    lines = [line for text in paragraphs for line in [*textwrap.wrap(text, WIDTH - 3), ""]]
    lines += head.contract.splitlines()
    # The contract may quote names that users gave: nothing in it may end the comment, or nest one.
    plain = [_plain(line) for line in lines]
    return "\n".join([f"/* {plain[0]}", *(f" * {line}".rstrip() for line in plain[1:]), " */"])


def _plain(line: str) -> str:
    return line.encode("ascii", "replace").decode().replace("*/", "* /").replace("/*", "/ *").rstrip("\\ ")
