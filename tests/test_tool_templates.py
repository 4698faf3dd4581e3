"""Tools and calls in chat templates, against transformers' own rendering."""

from __future__ import annotations

import json
from typing import Any

import pytest
from engines import tokenizer
from families import tiny_tokenizer
from test_serve_clients import HERMES, LLAMA3, TIME, WEATHER

from moac_runtime.errors import UsageError
from moac_runtime.text.boundaries import message_ends

HEAD = "{% for message in messages %}{{ message.role }}:{{ message.content }}"
CALLS = "{% for call in message.tool_calls or [] %}{% set f = call.function %}"
TAIL = "{% endfor %}\n{% endfor %}"
DUMPED = HEAD + CALLS + "{{ f.name }}({{ f.arguments | tojson }})" + TAIL
WALKED = HEAD + CALLS + "{% for k, v in f.arguments.items() %}{{ k }}={{ v }};{% endfor %}" + TAIL
ADDED = HEAD + CALLS + "{{ f.name + '(' + f.arguments + ')' }}" + TAIL
SHOWN = HEAD + CALLS + "{{ f.name }} {{ f.arguments }}" + TAIL
ARGUMENTS = {"city": "Z\u00fcrich", "days": [1, 2], "deep": {"a": None, "b": True}}


def turns(arguments: Any, **content: Any) -> list[dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": "", **content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "22"},
    ]


@pytest.mark.parametrize("template", [DUMPED, WALKED, ADDED, SHOWN])
def test_arguments_on_the_wire_render_as_the_template_wants_them(template: str) -> None:
    written = json.dumps(ARGUMENTS, ensure_ascii=False)
    as_text = template in (ADDED, SHOWN)  # these want the text, the others the object
    wanted = tiny_tokenizer().apply_chat_template(
        turns(written if as_text else ARGUMENTS), chat_template=template, tokenize=False
    )
    found = tokenizer(template).chat(turns(written), add_generation_prompt=False)
    assert found == wanted
    assert "Z\u00fcrich" in found


@pytest.mark.parametrize("template", [HERMES, LLAMA3])
def test_tools_render_as_transformers_renders_them(template: str) -> None:
    tools: list[Any] = [WEATHER, TIME]
    asked = [{"role": "user", "content": "How is Rome?"}]
    made = tokenizer(template)
    wanted = tiny_tokenizer().apply_chat_template(
        asked, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    tokens = made.encode_chat(asked, tools=tools)
    assert made.backend.decode(tokens, skip_special_tokens=False) == wanted
    assert made.takes_tools
    assert not tokenizer().takes_tools


def test_a_variable_of_the_runtime_s_cannot_be_set() -> None:
    asked = [{"role": "user", "content": "hi"}]
    for name in ("messages", "tools", "add_generation_prompt", "bos_token"):
        with pytest.raises(UsageError, match=f"{name} is no variable of a template to be set"):
            tokenizer().encode_chat(asked, variables={name: 1})


def test_messages_end_where_another_conversation_may_go_on() -> None:
    made = tokenizer()
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    tokens = made.encode_chat(asked)
    ends = message_ends(made, asked, tokens)
    spelled = [made.backend.decode(tokens[:end], skip_special_tokens=False) for end in ends]
    assert spelled == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n",
    ]
    for other in ("ho", "1", "2 or more"):
        more = made.encode_chat([asked[0], {"role": "user", "content": other}])
        assert more[: ends[0]] == tokens[: ends[0]]


def test_a_template_that_takes_no_shorter_conversation_marks_what_it_can() -> None:
    strict = (
        "{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}"
        "{% for message in messages %}{{ message.role }}:{{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    made = tokenizer(strict)
    asked = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    tokens = made.encode_chat(asked)
    assert len(message_ends(made, asked, tokens)) == 1
