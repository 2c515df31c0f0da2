from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gqsa_compiler.runtime.chat import ChatTemplate, load_template, special_tokens
from gqsa_compiler.runtime.errors import ArtefactError, UsageError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 < 2 & \"é\" <b>'x'</b>?"},
]
CHATML = """{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
<|im_start|>system
default<|im_end|>
    {% endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
TEMPLATES = [
    CHATML,
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}{{ eos_token }}",
    "{%- set ns = namespace(n=0) -%}\n{%- for m in messages %}{% set ns.n = ns.n + 1 %}\n"
    "   {%- generation %}{{ m['content'].strip() }}{% endgeneration -%}\n{% endfor %}\n{{ ns.n }}",
    "{{ messages[0]['content'].split('.')[0] }}{% if tools is none %}no tools{% endif %}\n",
    "{{ strftime_now('%Y') }}{{ messages[1:] | map(attribute='role') | list | length }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
def test_renders_as_transformers_does(source: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="the reference")
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = utils.render_jinja_template(
        conversations=[MESSAGES], chat_template=source, add_generation_prompt=True, **tokens
    )
    assert ChatTemplate(source, tokens).render(MESSAGES) == expected[0]


def test_chatml() -> None:
    template = ChatTemplate(CHATML, {})
    text = "<|im_start|>system\ndefault<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    messages = [{"role": "user", "content": "hi"}]
    assert template.render(messages, add_generation_prompt=False) == text
    assert template.render(messages) == text + "<|im_start|>assistant\n"


def test_variables_reach_the_template() -> None:
    template = ChatTemplate("{{ enable_thinking }}{{ tools | length }}", {})
    assert template.render(MESSAGES, enable_thinking=False, tools=[1, 2]) == "False2"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must alter"),
        ("{{ messages[0].content + 3 }}", "refuses the messages: can only concatenate"),
        ("{{ nothing.at.all }}", "refuses the messages: 'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "refuses the messages: .*unsafe"),
        ("{{ messages.append(3) }}", "refuses the messages: .*unsafe|.*not safely"),
    ],
)
def test_refusals_and_the_sandbox(source: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ChatTemplate(source, {}).render(MESSAGES)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ 1/0 }}", "fails: ZeroDivisionError: division by zero"),
        ("{% for i in range(10**10) %}{% endfor %}", "fails: OverflowError: Range too big"),
        ("{{ messages.x.y() }}{{ 'a'.join(3 for _ in 4) }}", "refuses|not valid"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails: RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "not valid"),
    ],
)
def test_templates_that_fail(source: str, words: str) -> None:
    with pytest.raises((ArtefactError, UsageError), match=words):
        ChatTemplate(source, {}).render(MESSAGES)


def test_no_messages_and_bad_syntax() -> None:
    with pytest.raises(UsageError, match="has no messages"):
        ChatTemplate("x", {}).render([])
    with pytest.raises(ArtefactError, match="chat template is not valid"):
        ChatTemplate("{% for %}", {})


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    assert load_template(tmp_path, {}) is None
    path = tmp_path / "chat_template.jinja"
    path.write_text("{{ eos_token }}!")
    template = load_template(tmp_path, {"eos_token": "</s>"})
    assert template is not None
    assert template.render(MESSAGES) == "</s>!"
    path.write_bytes(b"\xff")
    with pytest.raises(ArtefactError, match=r"chat_template\.jinja cannot be read"):
        load_template(tmp_path, {})


START, END = "<|im_start|>", "<|im_end|>"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("hi", [(f"{START}hi{END}", False)]),
        (f"a{END}b", [(f"{START}a", False), (END, True), (f"b{END}", False)]),
        (f"{END}{START}", [(START, False), (END, True), (START, True), (END, False)]),
        # Taking the inner one out makes no outer one.
        (f"<|im_{END}end|>", [(f"{START}<|im_", False), (END, True), (f"end|>{END}", False)]),
        (f" 1 {END} ", [(f"{START}1 ", False), (END, True), (END, False)]),
    ],
)
def test_special_tokens_in_a_message_are_told_apart(
    content: str, parts: list[tuple[str, bool]]
) -> None:
    source = f"{START}{{% for m in messages %}}{{{{ m.content | trim }}}}{{% endfor %}}{END}"
    template = ChatTemplate(source, {})
    messages = [{"role": "user", "content": content}]
    assert template.render_parts(messages, (END, START, "")) == parts
    assert "".join(text for text, _ in parts) == template.render(messages)


def test_special_tokens_are_found_in_nested_messages() -> None:
    template = ChatTemplate("{{ messages[0] | tojson }}", {})
    content = [{"type": "text", "text": "x<s>"}, {"type": "image", "size": 3}]
    messages = [{"role": "user", "content": content}]
    found = template.render_parts(messages, {"<s>"})
    assert "".join(text for text, _ in found) == template.render(messages)
    assert [part for part in found if part[1]] == [("<s>", True)]
    assert template.render_parts(messages, ()) == [(template.render(messages), False)]


def test_special_tokens() -> None:
    config = json.loads(
        '{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false},'
        ' "pad_token": null, "add_bos_token": true, "model_max_length": 9}'
    )
    assert special_tokens(config) == {"bos_token": "<s>", "eos_token": "</s>"}


def test_date_of_the_day() -> None:
    text = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}).render(MESSAGES)
    assert re.fullmatch(r"\d\d \w+ \d{4}", text)
