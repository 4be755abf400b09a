"""Helper functions of compiled programs: Python's `%` and `//` for f64, overflow of a product.

Interface: `library(names)` is the WebAssembly text of the helpers `names` need.
`$fmod` is the exact remainder of truncated division: both operands as integers when they are whole
and below 2^53 (one machine division), else long division of the significands, one bit a step and at
most 2046 steps. `$python_mod` and `$python_div` follow the definitions of CPython's float `%` and
`//` (Objects/floatobject.c): the remainder takes the divisor's sign, the quotient is rounded down.
The divisor is not zero: the caller has checked.
"""

from __future__ import annotations

_FMOD = """
(func $fmod (param $x f64) (param $y f64) (result f64)
  (local $m i64) (local $n i64) (local $e i64) (local $d i64) (local $s i64)
  local.get $x f64.abs f64.const 0x1p53 f64.lt
  local.get $y f64.abs f64.const 0x1p53 f64.lt i32.and
  local.get $x f64.trunc local.get $x f64.eq i32.and
  local.get $y f64.trunc local.get $y f64.eq i32.and
  if
    local.get $x i64.trunc_sat_f64_s local.get $y i64.trunc_sat_f64_s i64.rem_s
    f64.convert_i64_s f64.abs local.get $x f64.copysign return
  end
  local.get $x local.get $x f64.ne local.get $y local.get $y f64.ne i32.or
  local.get $x f64.abs f64.const inf f64.eq i32.or
  if f64.const nan return end
  local.get $x f64.abs local.get $y f64.abs f64.lt
  if local.get $x return end
  ;; significand and exponent of |x| in m, e; of |y| in n, d
  local.get $x f64.abs i64.reinterpret_f64 local.set $m
  local.get $y f64.abs i64.reinterpret_f64 local.set $n
  local.get $m i64.const 52 i64.shr_u local.set $e
  local.get $n i64.const 52 i64.shr_u local.set $d
  local.get $e i64.eqz
  if
    local.get $m i64.clz i64.const 11 i64.sub local.set $s
    local.get $m local.get $s i64.shl local.set $m
    i64.const 1 local.get $s i64.sub local.set $e
  else
    local.get $m i64.const 0xfffffffffffff i64.and i64.const 0x10000000000000 i64.or local.set $m
  end
  local.get $d i64.eqz
  if
    local.get $n i64.clz i64.const 11 i64.sub local.set $s
    local.get $n local.get $s i64.shl local.set $n
    i64.const 1 local.get $s i64.sub local.set $d
  else
    local.get $n i64.const 0xfffffffffffff i64.and i64.const 0x10000000000000 i64.or local.set $n
  end
  block $aligned
    loop $step
      local.get $m local.get $n i64.ge_u
      if local.get $m local.get $n i64.sub local.set $m end
      local.get $e local.get $d i64.le_s br_if $aligned
      local.get $m i64.const 1 i64.shl local.set $m
      local.get $e i64.const 1 i64.sub local.set $e
      br $step
    end
  end
  local.get $m i64.eqz
  if f64.const 0 local.get $x f64.copysign return end
  local.get $m i64.clz i64.const 11 i64.sub local.set $s
  local.get $m local.get $s i64.shl local.set $m
  local.get $e local.get $s i64.sub local.set $e
  local.get $e i64.const 0 i64.gt_s
  if (result i64)
    local.get $m i64.const 0xfffffffffffff i64.and local.get $e i64.const 52 i64.shl i64.or
  else
    local.get $m i64.const 1 local.get $e i64.sub i64.shr_u
  end
  f64.reinterpret_i64 local.get $x f64.copysign)
"""

_PYTHON_MOD = """
(func $python_mod (param $x f64) (param $y f64) (result f64)
  (local $r f64)
  local.get $x local.get $y call $fmod local.tee $r
  f64.const 0 f64.eq
  if f64.const 0 local.get $y f64.copysign return end
  local.get $r local.get $y f64.add
  local.get $r
  local.get $y f64.const 0 f64.lt local.get $r f64.const 0 f64.lt i32.ne
  select)
"""

_PYTHON_DIV = """
(func $python_div (param $x f64) (param $y f64) (result f64)
  (local $r f64) (local $q f64) (local $w f64)
  local.get $x local.get $y call $fmod local.set $r
  local.get $x local.get $r f64.sub local.get $y f64.div local.set $q
  local.get $r f64.const 0 f64.ne
  local.get $y f64.const 0 f64.lt local.get $r f64.const 0 f64.lt i32.ne i32.and
  if local.get $q f64.const 1 f64.sub local.set $q end
  local.get $q f64.const 0 f64.eq
  if f64.const 0 local.get $x local.get $y f64.div f64.copysign return end
  local.get $q f64.floor local.set $w
  local.get $w f64.const 1 f64.add
  local.get $w
  local.get $q local.get $w f64.sub f64.const 0.5 f64.gt
  select)
"""

_MUL_OVERFLOWS = """
(func $mul_overflows (param $x i64) (param $y i64) (result i32)
  local.get $y i64.eqz if i32.const 0 return end
  local.get $y i64.const -1 i64.eq
  if local.get $x i64.const -0x8000000000000000 i64.eq return end
  local.get $x local.get $y i64.mul local.get $y i64.div_s local.get $x i64.ne)
"""


def library(names: set[str]) -> str:
    """The helpers in `names` and what they call."""
    text = _FMOD if names & {"python_mod", "python_div"} else ""
    text += _MUL_OVERFLOWS if "mul_overflows" in names else ""
    text += _PYTHON_MOD if "python_mod" in names else ""
    return text + (_PYTHON_DIV if "python_div" in names else "")
