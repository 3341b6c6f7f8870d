"""Answers that want to run code, hang, eat memory or confuse, for the verifier's tests and its benchmark. No tests."""

from __future__ import annotations

MARKER = "{MARKER}"
"""Stands for a file that must not come to be."""

BIG = 1 << 20

_CODE = [
    "__import__('os').system('touch {MARKER}')",
    "open('{MARKER}', 'w').write('x')",
    "eval(\"__import__('os').system('touch {MARKER}')\")",
    "exec(\"open('{MARKER}','w')\")",
    "().__class__.__base__.__subclasses__()[104].load_module('os').system('touch {MARKER}')",
    "lambda: __import__('subprocess').run(['touch', '{MARKER}'])",
    "(lambda: open('{MARKER}', 'w'))()",
    "Symbol('x').__class__.__init__.__globals__['sys'].modules['os'].system('touch {MARKER}')",
    "\\operatorname{__import__}('os').system('touch {MARKER}')",
    "\\text{__import__('os').system('touch {MARKER}')}",
    "1 + __import__('os').system('touch {MARKER}')",
    "42) or __import__('os').system('touch {MARKER}') or (42",
    "{0.__class__.__init__.__globals__}",
    "%s%s%s%n {MARKER}",
    "$(touch {MARKER})",
    "`touch {MARKER}`",
    "; touch {MARKER} #",
    "\\input{/etc/passwd}",
    "\\write18{touch {MARKER}}",
    "\\immediate\\write18{touch {MARKER}}",
    "__import__('os').environ['HEADRACE_SECRET']",
    "os.environ",
    "!!python/object/apply:os.system ['touch {MARKER}']",
    "cos\nsystem\n(S'touch {MARKER}'\ntR.",
]
_POWERS = [
    "9^{9^{9^{9}}}",
    "9^(9^(9^9))",
    "9**9**9**9",
    "10^{10^{10}}",
    "2^{2^{2^{2^{2^{2}}}}}",
    "(10^{1000000})!",
    "99999999!",
    "9!!!!!!!!!!!!!!!!",
    "\\binom{10^9}{5\\cdot10^8}",
    "\\sum_{i=1}^{10^{12}} i^{i}",
    "\\prod_{i=1}^{10^{9}} i",
    "\\int_0^1 \\sin(\\sin(\\sin(\\sin(\\sin(x^x))))) dx",
    "\\lim_{x \\to 0} \\frac{\\sin(\\tan(x)) - \\tan(\\sin(x))}{x^{99}}",
    "(x+y+z+w)^{5000}",
    "(1+x)^{100000}(1-x)^{100000}",
    "0." + "3" * 50_000,
    "9" * 100_000,
    "1e999999999",
    "\\frac{1}{" * 300 + "2" + "}" * 300,
    "\\sqrt{" * 2000 + "2" + "}" * 2000,
]
_NESTING = [
    "(" * 10_000 + "1" + ")" * 10_000,
    "{" * 100_000,
    "}" * 100_000,
    "[" * 50_000 + "]" * 50_000,
    "\\boxed{" * 20_000 + "42" + "}" * 20_000,
    "\\left(" * 3000 + "42" + "\\right)" * 3000,
    "-" * 20_000 + "42",
    "$" * 9_999 + "42",
    "\\frac" * 5000,
    "1+" * 20_000 + "1",
    "1," * 20_000 + "1",
    "x_{" * 3000 + "1" + "}" * 3000,
]
_UNICODE = [
    "\u202e24\u202c",
    "4\u200b3",
    "\u0664\u0663",
    "\uff14\uff13",
    "\U0001d7d2\U0001d7d1",
    "\u2074\u00b3",
    "four\u00addy three",
    "\ud800\udfff\ud800",
    "\x00\x01\x02 43 \x7f",
    "\ufeff43",
    "\u0434\u0432\u0430",
    "\u7b54\u6848\u662f\u56db\u5341\u4e09",
]
_LONG = [
    "a" * BIG,
    "1 " * (BIG // 2),
    "\\" * BIG,
    "answer:" * (BIG // 7),
    "\\boxed{1}" * (BIG // 9),
    "\\boxed{" * (BIG // 7),
    "<think>" * (BIG // 7),
    "$1$ and " * (BIG // 8),
    "final answer is " * (BIG // 16),
    "\n" * BIG,
    "\\boxed{" + "7" * BIG + "}",
    "\u0663" * BIG,
]
_EMPTY = ["", " ", "\n\n", "\\boxed{}", "Answer:", "$$", "<think>43", "43</think>", "\\boxed{43", "####"]

HOSTILE = [*_CODE, *_POWERS, *_NESTING, *_UNICODE, *_LONG, *_EMPTY]
"""None of them is right about WANTED."""

WANTED = "-7391"


def dressed() -> list[str]:
    """HOSTILE, and the code and the powers once more in a box and in dollars, where a parser will look at them."""
    return [*HOSTILE, *(rf"\boxed{{{text}}}" for text in _CODE + _POWERS), *(f"so ${text}$." for text in _POWERS)]
