"""Tokenizer, chat templates against transformers, streamed text and stop strings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from moac_runtime.errors import ArtifactError, MoacError, UsageError
from moac_runtime.text.stream import StopStrings, TextStream
from moac_runtime.text.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>", "<|im_end|>"]

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if message.tool_calls is defined %}
        {%- continue %}
    {%- endif %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate\\
 user/assistant.") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- else %}
        {%- break %}
    {%- endif %}
{%- endfor %}
"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- '<think>' + reasoning_content.strip('\\n') + '</think>' + content + '<|im_end|>' }}
        {%- endgeneration %}
        {%- if message.tool_calls %}
            {%- for call in message.tool_calls %}
                {{- '<tool_call>' ~ call.function | tojson(indent=2) ~ '</tool_call>' }}
            {%- endfor %}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# Blocks on lines of their own show trim_blocks and lstrip_blocks; `dict` is the sandbox's own.
LAYOUT = """{% set names = dict(user="U", assistant="A") %}
{% for message in messages %}
    {% if message['role'] in names %}
  {{ names[message['role']] }}: {{ message['content'] }}
    {% endif %}
{% endfor %}
{{ tools is defined }} {{ documents is none }} {{ pad_token is defined }}
{{ {"a": "<é>"} | tojson }}
"""

USER = {"role": "user", "content": "  What is 2 < 3 & 'é'? 😀 "}
ASSISTANT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTrue."}
SYSTEM = {"role": "system", "content": "Be brief. "}
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}
CONVERSATIONS: dict[str, Any] = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ASSISTANT, USER],
    "tools": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    "reasoning": [USER, {**ASSISTANT, "thinking": "two and three"}, USER],
}
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "qwen": QWEN,
    "layout": LAYOUT,
}


def byte_backend() -> tokenizers.Tokenizer:
    """One token per byte, special tokens behind them, `<s>` put before plain text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    return backend


def metaspace_backend() -> tokenizers.Tokenizer:
    """Like Llama 2's: words after `▁`, unknown characters as bytes, first space stripped."""
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3, "b": 4, "</s>": 5}
    vocabulary |= {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    model = models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["</s>"])
    return backend


def byte_tokenizer(template: str | None = CHATML) -> Tokenizer:
    return Tokenizer(
        backend=byte_backend(),
        eos_token_ids=frozenset({257, 258}),
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        chat_template=template,
    )


def write_tokenizer(folder: Path, **settings: Any) -> tuple[Path, Path]:
    files = folder / "tokenizer.json", folder / "generation.json"
    byte_backend().save(str(files[0]))
    files[1].write_text(json.dumps({"eos_token_ids": [257], **settings}), encoding="utf-8")
    return files


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_reads_as_transformers_renders_it(
    name: str, conversation: str, add_generation_prompt: bool
) -> None:
    from transformers import PreTrainedTokenizerFast  # other tests import this file, not that one
    from transformers.utils import chat_template_utils

    renders_as_today = hasattr(chat_template_utils, "_alias_reasoning_fields")
    if conversation in ("tools", "reasoning") and not renders_as_today:
        pytest.skip("this transformers renders None as a word, and one name of reasoning alone")
    messages = CONVERSATIONS[conversation]
    reference: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=byte_backend(), bos_token="<s>", eos_token="</s>"
    )
    reference.chat_template = TEMPLATES[name]

    def expected() -> Any:
        return reference.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    tokenizer = byte_tokenizer(TEMPLATES[name])
    try:
        wanted = expected()
    except Exception:
        # Templates that cannot take a message without content must fail here as they do there.
        with pytest.raises(MoacError, match="refused this conversation"):
            tokenizer.chat(messages, add_generation_prompt=add_generation_prompt)
        assert conversation == "tools"
        return
    found = tokenizer.chat(messages, add_generation_prompt=add_generation_prompt)
    assert found == wanted
    ids = reference.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    assert tokenizer.encode(found, special=False) == ids


def test_templates_differ_where_they_should() -> None:
    with_prompt = {byte_tokenizer(t).chat([USER]) for t in TEMPLATES.values()}
    assert len(with_prompt) == len(TEMPLATES)


def test_raise_exception_is_one_sentence() -> None:
    with pytest.raises(MoacError) as caught:
        byte_tokenizer(MISTRAL).chat([USER, USER])
    message = str(caught.value)
    assert "roles must alternate user/assistant" in message
    assert "--raw" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% set ns = namespace(_a=1) %}",
        "{{ dict.__call__.__globals__ }}",
    ],
)
def test_templates_stay_in_the_sandbox(template: str) -> None:
    with pytest.raises(MoacError):
        byte_tokenizer(template).chat([USER])


@pytest.mark.parametrize("template", ["{% for %}", "{% if a %}" * 200 + "{% endif %}" * 200])
def test_a_broken_template_is_one_sentence(template: str) -> None:
    with pytest.raises(ArtifactError, match="not valid Jinja"):
        byte_tokenizer(template).chat([USER])


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{% for tool in tools %}{{ tool }}{% endfor %}", "'NoneType' object is not iterable"),
        ("{{ 1 // (messages | length - 1) }}", "by zero"),
        ("{{ messages[0].nothing.at_all }}", "has no attribute 'nothing'"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{{ messages[7]['content'] }}", "has no element 7"),
        ("{{ '%d' % messages[0].content }}", "number is required"),
    ],
)
def test_whatever_a_template_raises_is_one_sentence(template: str, fault: str) -> None:
    with pytest.raises(MoacError, match="chat template refused this conversation") as caught:
        byte_tokenizer(template).encode_chat([USER])
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_template_says_raw() -> None:
    with pytest.raises(UsageError, match="no chat template; use --raw"):
        byte_tokenizer(None).chat([USER])


def test_messages_are_not_changed() -> None:
    message = {"role": "user", "content": "hi", "tool_calls": None, "reasoning": "so"}
    before = dict(message)
    byte_tokenizer().chat([message])
    assert message == before


def test_encode_with_and_without_special_tokens() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("hi", special=True) == [256, *tokenizer.encode("hi", special=False)]
    assert tokenizer.encode("</s>", special=False) == [257]
    assert tokenizer.decode([256, *tokenizer.encode("hé", special=False), 257]) == "hé"


def test_bytes_that_are_not_text_are_refused() -> None:
    with pytest.raises(UsageError, match="not UTF-8"):
        byte_tokenizer().encode(b"caf\xe9".decode("utf-8", "surrogateescape"), special=True)


def test_read_takes_settings_and_never_truncates(tmp_path: Path) -> None:
    tokens, settings = write_tokenizer(
        tmp_path, eos_token_ids=[257, 258], bos_token="<s>", eos_token="</s>", pad_token=None
    )
    backend = byte_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=32)
    backend.save(str(tokens))
    template = tmp_path / "chat_template.jinja"
    template.write_text("é{{ bos_token }}", encoding="utf-8")
    tokenizer = Tokenizer.parsed(tokens.read_bytes(), settings.read_bytes(), template.read_bytes())
    assert len(tokenizer.encode("twelve bytes", special=False)) == 12
    assert tokenizer.eos_token_ids == {257, 258}
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.chat([USER]) == "é<s>"
    assert Tokenizer.parsed(tokens.read_bytes(), settings.read_bytes(), None).chat_template is None


@pytest.mark.parametrize(
    "settings", ["{", "[]", "{}", '{"eos_token_ids": 3}', '{"eos_token_ids": ["a"]}']
)
def test_damaged_settings_are_named(tmp_path: Path, settings: str) -> None:
    files = write_tokenizer(tmp_path)
    files[1].write_text(settings, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"generation\.json"):
        Tokenizer.parsed(*(file.read_bytes() for file in files), None)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    files = write_tokenizer(tmp_path)
    files[0].write_text("{}", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer.parsed(*(file.read_bytes() for file in files), None)


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    stream = TextStream(tokenizer.decode)
    return [*(stream.push(token) for token in tokens), stream.finish()]


def test_streamed_characters_are_whole() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode("hé😀!", special=False)
    assert streamed(tokenizer, tokens) == ["h", "", "é", "", "", "", "😀", "!", ""]


def test_an_unfinished_character_is_left_out() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode("ab😀", special=False)
    for cut in range(3, 6):
        assert "".join(streamed(tokenizer, tokens[:cut])) == "ab"


def test_special_tokens_and_unknown_ids_give_no_text() -> None:
    tokenizer = byte_tokenizer()
    a, b = tokenizer.encode("ab", special=False)
    assert "".join(streamed(tokenizer, [256, a, 257, 99999, b, 258])) == "ab"


@given(st.text(max_size=30))
def test_streamed_text_is_the_decoded_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode(text, special=False)
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens).rstrip("\ufffd")


@given(st.lists(st.integers(min_value=0, max_value=261), max_size=20))
def test_streamed_bytes_of_no_character_never_fail(tokens: list[int]) -> None:
    tokenizer = Tokenizer(metaspace_backend(), frozenset({5}), {}, None)
    found, whole = "".join(streamed(tokenizer, tokens)), tokenizer.decode(tokens)
    if "\ufffd" not in whole:
        assert found == whole


@given(st.text(max_size=20))
def test_streamed_text_is_the_decoded_text_with_byte_fallback(text: str) -> None:
    tokenizer = Tokenizer(metaspace_backend(), frozenset({5}), {}, None)
    tokens = tokenizer.encode(text, special=False)
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens).rstrip("\ufffd")


def stopped(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    cutter = StopStrings(stops)
    return [*(cutter.push(piece) for piece in pieces), cutter.finish()], cutter.found


def test_a_stop_string_over_several_pieces() -> None:
    assert stopped(["END"], ["a", "E", "N", "D", "b"]) == (["a", "", "", "", "", ""], True)


def test_held_text_comes_out_when_it_is_no_stop() -> None:
    assert stopped(["END"], ["aE", "N", "x", "E"]) == (["a", "", "ENx", "", "E"], False)


def test_the_earliest_stop_wins() -> None:
    assert stopped(["c", "ab"], ["xabc"]) == (["x", ""], True)


def test_hidden_text_is_matched_and_never_comes_out() -> None:
    cutter = StopStrings(["b<e>c"])
    pieces = [("ab", False), ("<e>", True), ("x", False), ("b", False), ("<e>", True)]
    assert [cutter.push(text, hidden=hidden) for text, hidden in pieces] == ["a", "", "bx", "", ""]
    assert (cutter.push("c"), cutter.found) == ("", True)


def test_hidden_text_that_is_no_stop_stays_hidden() -> None:
    cutter = StopStrings(["<e>c"])
    assert [cutter.push("a"), cutter.push("<e>", hidden=True), cutter.push("b")] == ["a", "", "b"]
    assert (cutter.push("<e>", hidden=True), cutter.finish(), cutter.found) == ("", "", False)


def test_overlapping_stop_prefixes() -> None:
    assert stopped(["aab"], ["a", "a", "a", "b"]) == (["", "", "a", "", ""], True)


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=3), max_size=8),
)
def test_stops_cut_as_on_the_whole_text(stops: list[str], pieces: list[str]) -> None:
    """Piecewise equals one pass that ends at the first moment a stop is complete."""
    text = "".join(pieces)
    found, hit = stopped(stops, list(text))
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops or ["c" * 99]))]
    assert hit == bool(ends)
    assert not any(stop in "".join(found) for stop in stops)
    assert text.startswith("".join(found))
    if not hit:
        assert "".join(found) == text
