"""Chat templates write what transformers writes, whatever of Jinja they use; and settings of tokenizers are no tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from graphopt.data.chat_template import render, special_tokens
from graphopt.data.tokenizer import Tokenizer
from graphopt.ir.errors import CheckpointError, UsageError

TALKS: dict[str, list[dict[str, Any]]] = {
    "plain": [
        {"role": "system", "content": "be <b>short</b> & \"true\""},
        {"role": "user", "content": "who are you"},
        {"role": "assistant", "content": "a small mödel"},
        {"role": "user", "content": "how small"},
    ],
    "empty answer": [{"role": "user", "content": " x\n"}, {"role": "assistant", "content": ""}],
    "nothing said": [
        {"role": "user", "content": "call"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"b": [1, None], "a": "é"}}]},
        {"role": "tool", "content": "7", "name": None},
    ],
    "thinking": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2", "reasoning": "easy"}],
}  # fmt: skip

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>'"
        " + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "lines and blocks": """{{ bos_token }}
    {%- for m in messages %}
        {%- if loop.first and m.role != 'system' %}
    [system] none
        {%- endif %}
    {% if m.content is defined %}
        [{{ m.role | upper }}] {{ m.content | trim }}
    {% endif %}
    {%- endfor %}
{% if add_generation_prompt %}

[ASSISTANT]
{% endif %}
""",
    "generation": """{% for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set said = m.content %}
        {%- generation -%}
        {% set inner = 'x' %}
 {{ said }}{{ eos_token }}
        {%- endgeneration %}
        {{- inner is defined }}
    {%- else %}
        {{- m.content }}
    {%- endif %}
{% endfor %}""",
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }};"
        "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
    ),
    "tojson": (
        "{% for m in messages %}{{ m | tojson }}|{{ m | tojson(indent=2) }}|{{ m | tojson(sort_keys=True, separators=(',', ':')) }}"
        "|{{ m.content | tojson(ensure_ascii=True) }}{% endfor %}"
    ),
    "namespace": (
        "{% set ns = namespace(count=0, last='') %}{% for m in messages %}{% set ns.count = ns.count + 1 %}"
        "{% set ns.last = m.role %}{% endfor %}{{ ns.count }} {{ ns.last }} {{ dict(a=1) }}"
    ),
    "tools": "{% if tools %}tools{% else %}none{% endif %}{{ documents is none }}{% if not documents is defined %}!{% endif %}",
    "macros": "{% macro say(m) %}<{{ m.role }}>{{ m.get('content', '-') }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "thinking": "{% for m in messages %}{{ m.reasoning_content or '' }}/{{ m.thinking or '' }}/{{ m.reasoning or '' }};{% endfor %}",
    "special": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token is defined }}{{ add_bos_token is defined }}",
    "slices": "{% for m in messages[::-1] %}{{ m.role[:2] }}{{ m['role'].startswith('u') }}{% endfor %}{{ messages | length }}",
    "refusing": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system ' + m.role) }}{% endif %}"
        "{{ m.role }}{% endfor %}"
    ),
    "today": "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}",
    "wrong": "{{ messages[0].content + 1 }}",
    "private": "{{ messages.__class__.__mro__ }}",
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer as Fast
    from tokenizers import models

    fast = Fast(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("answering", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_write_what_they_write_in_transformers(
    name: str, answering: bool, theirs: PreTrainedTokenizerFast
) -> None:
    template = TEMPLATES[name]
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for talk in TALKS.values():
        before = None if name != "today" else render(template, talk, special, answering=answering)
        try:
            expected = theirs.apply_chat_template(
                talk, chat_template=template, tokenize=False, add_generation_prompt=answering
            )
        except Exception:
            with pytest.raises(UsageError, match="does not accept the conversation"):
                render(template, talk, special, answering=answering)
            continue
        found = render(template, talk, special, answering=answering)
        assert expected in (found, before)  # the day may have ended in between


def test_what_a_template_refuses_is_said() -> None:
    with pytest.raises(UsageError, match="no system system"):
        render(TEMPLATES["refusing"], TALKS["plain"], {}, answering=False)
    with pytest.raises(CheckpointError, match="cannot be read"):
        render("{% for m in messages %}", TALKS["plain"], {}, answering=False)
    with pytest.raises(CheckpointError, match="cannot be read"):
        render("{% generation %}", TALKS["plain"], {}, answering=False)


def test_settings_of_a_tokenizer_are_no_tokens() -> None:
    config = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>",
        "pad_token": None, "image_token": "<image>", "extra_special_tokens": ["<x>"], "unk_token": 7,
    }  # fmt: skip
    assert special_tokens(config) == {"bos_token": "<s>", "eos_token": "</s>"}
    assert special_tokens(config, {"bos_token": "other", "pad_token": {"content": "<pad>"}}) == {
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
    }  # fmt: skip


class Origin:
    def __init__(self, **assets: Any):
        from tokenizers import Tokenizer as Fast
        from tokenizers import models

        self.assets = {"tokenizer.json": Fast(models.WordLevel({"a": 0}, unk_token="a")).to_str().encode()}
        self.assets |= {k.replace("__", "."): v for k, v in assets.items()}


class Holder:
    def __init__(self, **assets: Any):
        self.origin = Origin(**assets)


def read(**assets: Any) -> Tokenizer:
    return Tokenizer(Holder(**assets))  # type: ignore[arg-type]


def test_templates_by_name_and_in_files() -> None:
    two = [
        {"name": "tool_use", "template": "t"},
        {"name": "default", "template": "{{ add_bos_token is defined }}"},
    ]
    settings = json.dumps({"chat_template": two, "add_bos_token": True}).encode()
    assert read(tokenizer_config__json=settings).chat([{"role": "user", "content": "x"}]) == "False"
    assert read(tokenizer_config__json=settings, chat_template__jinja=b"file").template == "file"
    for wrong, says in [
        ({"tokenizer_config__json": json.dumps({"chat_template": two[:1]}).encode()}, "none is the default"),
        ({"tokenizer_config__json": json.dumps({"chat_template": 7}).encode()}, "is no text"),
        ({"tokenizer_config__json": b"{"}, "tokenizer_config.json is not JSON"),
        ({"tokenizer_config__json": b"[]"}, "holds no table"),
        ({"special_tokens_map__json": b"3"}, "holds no table"),
        ({"chat_template__jinja": b"\xff\xfe"}, "is no text"),
    ]:
        with pytest.raises(CheckpointError, match=says):
            read(**wrong)
