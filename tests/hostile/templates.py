"""Chat templates that want out, never end or write without end, put together of pieces."""

from __future__ import annotations

from random import Random

_VALUES = (
    *("messages", "messages[0]", "messages[0].content", "bos_token", "tools", "loop", "self", "n"),
    *(
        "namespace",
        "dict",
        "cycler",
        "lipsum",
        "strftime_now",
        "raise_exception",
        "range",
        "joiner",
    ),
    *(
        "1",
        "'a'",
        "'%s'",
        "[]",
        "{}",
        "none",
        "1.5",
        "''",
        "'{0.__class__}'",
        "(1,)",
        "10**9",
        "-1",
    ),
    *("'\\ud800'", "range(99999)", "'a' * 9999", "caller", "varargs", "kwargs", "undefined"),
)
_ATTRIBUTES = (
    *("__class__", "__mro__", "__subclasses__()", "__globals__", "__init__", "__dict__", "mro()"),
    *("append(1)", "format(messages)", "format_map(messages)", "__getattribute__", "gi_frame"),
    *("content", "items()", "pop()", "update(a=1)", "join(messages)", "encode()", "strip()", "f"),
    *("zfill(99)", "ljust(999)", "replace('a', 'aa')", "split('')", "translate({})", "co_code"),
)
_FILTERS = (
    *("tojson", "list", "length", "trim", "upper", "join(',')", "sort", "map('upper')", "string"),
    *("attr('__class__')", "format(1)", "center(9999)", "batch(2)|list", "sum", "random", "int"),
    *("map(attribute='__class__')|list", "select('equalto', 1)|list", "groupby('role')", "e"),
    *("tojson(indent=9)", "pprint", "xmlattr", "urlize", "wordwrap(1)", "indent(99)", "float"),
    *("replace('a', 'b' * 99)", "slice(3)|list", "dictsort", "unique|list", "filesizeformat"),
)
_OPERATORS = ("+", "*", "~", "%", "**", "//", "in", "==", "<", "and")


def hostile_template(rng: Random, text: str) -> str:
    """A template with pieces put in, or one of such pieces alone."""
    pieces = "".join(_statement(rng, 3) for _ in range(rng.randint(1, 3)))
    if rng.random() < 0.3:
        return pieces
    at = rng.randint(0, len(text))
    return text[:at] + pieces + text[at:]


def _statement(rng: Random, deep: int) -> str:
    kind = rng.randint(0, 9) if deep else rng.randint(0, 1)
    inner = _statement(rng, deep - 1) if deep else ""
    value = _expression(rng, 2)
    match kind:
        case 0 | 1:
            return "{{ " + value + " }}"
        case 2:
            return "{% for n in " + value + " %}" + inner + "{% endfor %}"
        case 3:
            return "{% if " + value + " %}" + inner + "{% else %}x{% endif %}"
        case 4:
            return "{% set n = " + value + " %}" + inner
        case 5:
            return "{% macro f(n) %}" + inner + "{% endmacro %}{{ f(" + value + ") }}"
        case 6:
            return "{% set ns = namespace(a=" + value + ") %}{% set ns.a = ns.a %}" + inner
        case 7:
            return rng.choice(_BROKEN)
        case 8:
            return "{% generation %}" + inner + "{% endgeneration %}"
        case _:
            return (
                rng.choice(_ENDLESS)
                if rng.random() < 0.02
                else "{% filter upper %}x{% endfilter %}"
            )


def _expression(rng: Random, deep: int) -> str:
    value = rng.choice(_VALUES)
    for _ in range(rng.randint(0, 2)):
        kind = rng.randint(0, 3)
        if kind == 0:
            value = f"{value}.{rng.choice(_ATTRIBUTES)}"
        elif kind == 1:
            value = f"({value})|{rng.choice(_FILTERS)}"
        elif kind == 2 and deep:
            value = f"({value}) {rng.choice(_OPERATORS)} ({_expression(rng, deep - 1)})"
        else:
            value = f"{value}[{rng.choice(_VALUES)}]"
    return value


_BROKEN = (
    *("{%", "{{", "}}", "{% endfor %}", "{% include 'x' %}", "{% import 'x' as y %}", "{% raw %}"),
    *("{% extends 'x' %}", "{% call f() %}{% endcall %}", "{{ '" + "(" * 400 + "' }}", "{#", "\0"),
    "{{ " + "(" * 400 + "1" + ")" * 400 + " }}",
    "{{ " + "-" * 3000 + "1 }}",
    "{% if 1 %}" * 120 + "{% endif %}" * 120,
    "{% block a %}{{ self.a() }}{% endblock %}",
)
_ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "{{ 7 ** (9 ** 9) }}",
    "{{ messages|length ** (9 ** 9 ** messages|length) }}",
    "{{ 'a' * 9 ** 12 }}",
    "{% set n = namespace(a='x') %}{% for i in range(999) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "{{ '%999999999d' % 1 }}",
)
