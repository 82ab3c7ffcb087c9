"""Chat templates with the traits of the families that are fine-tuned most, each as short as these traits allow."""

from __future__ import annotations

from tests.worker.trainer.tiny import CHATML

_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

# Llama 3: contents are trimmed into a variable, to which the first turn adds the beginning.
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|im_end|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    + _PROMPT.replace("assistant\n", "assistant\n\n")
)
# Llama 3.1 and 3.2: the system turn is taken out, and a date is told.
DATED = (
    "{{- bos_token }}{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|im_start|>system\n' + 'Today: ' + day + '\n' }}{{- system }}{{- '<|im_end|>' }}"
    "{%- for message in messages %}{%- if not (message.role == 'tool' or 'tool_calls' in message) %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' }}{%- endif %}{%- endfor %}"
) + _PROMPT
# Qwen 2.5: a default system turn.
QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) "
    "or (message.role == 'assistant' and not message.tool_calls) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
) + _PROMPT
# Qwen 3: the last question is looked for, thoughts before it are left out, and the answer's are set apart.
QWEN3 = (
    "{%- set ns = namespace(looking=true, last=messages|length - 1) %}{%- for message in messages[::-1] %}"
    "{%- set index = (messages|length - 1) - loop.index0 %}{%- if ns.looking and message.role == 'user' and "
    "message.content is string and not(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}"
    "{%- set ns.looking = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}{%- for message in messages %}"
    "{%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}"
    "{%- endif %}{%- if message.role == 'assistant' %}{%- set thought = '' %}"
    "{%- if message.reasoning_content is string %}{%- set thought = message.reasoning_content %}{%- else %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or (not loop.last and thought)) %}"
    "{{- '<|im_start|>' + message.role + '\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' "
    "+ content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
) + _PROMPT
# Gemma: no system turn, strict order, another name for the assistant.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
# Mistral: the system turn goes into the question, and nothing begins an answer.
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'user' %}"
    "{{ ' [INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# SmolLM3 and others: markers.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
) + _PROMPT
BACKWARDS = "{% for message in messages | reverse %}{{ message['role'] + ':' + message['content'] + '\n' }}{% endfor %}"
MARKED_BACKWARDS = (
    "{% for message in messages | reverse %}{{ message['role'] + ':' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
MACRO = (
    "{% macro turn(message) %}{{ message['role'] + ': ' + message['content'] }}{% endmacro %}"
    "{% for message in messages %}{{ turn(message) | upper + eos_token }}{% endfor %}"
)
EMPTY_LEFT_OUT = (
    "{% for message in messages %}{% if message['content'].strip() %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'].strip() + '<|im_end|>' + '\n' }}{% endif %}"
    "{% endfor %}"
) + _PROMPT

ALL: dict[str, str | None] = {
    "none": None, "chatml": CHATML, "llama3": LLAMA3, "dated": DATED, "qwen2.5": QWEN25, "qwen3": QWEN3, "gemma": GEMMA,
    "mistral": MISTRAL, "marked": MARKED, "backwards": BACKWARDS, "marked backwards": MARKED_BACKWARDS, "macro": MACRO,
    "empty left out": EMPTY_LEFT_OUT,
}  # fmt: skip
# Of these the text of two short turns is known from one run.
FOLLOWED = ("chatml", "llama3", "dated", "qwen2.5", "gemma", "mistral", "marked", "backwards", "empty left out")

_EACH = "{%% for message in messages %%}%s{%% endfor %%}"
UNFOLLOWED = {
    name: _EACH % body
    for name, body in {
        "upper": "{{ message.content | upper }}",
        "length": "{{ message.content | length }}",
        "whole message": "{{ message }}",
        "json": "{{ message | tojson }}",
        "index": "{{ message.content[0] }}",
        "int": "{{ message.content | int }}",
        "float": "{{ message.content | float }}",
        "tilde": "{{ message.content ~ '' }}",
        "percent": "{{ '%s' % message.content }}",
        "format": "{{ '{}'.format(message.content) }}",
        "in literal": "{{ message.content in 'abc 12' }}",
        "is lower": "{{ message.content is lower }}",
        "replace": "{{ message.content | replace('a', 'b') }}",
        "block": "{% set x %}{{ message.content }}{% endset %}{{ x | upper }}",
        "filter block": "{% filter upper %}{{ message.content }}{% endfilter %}",
        "list index": "{{ ['x', 'y'][message.content] is defined }}",
        "order": "{{ message.content < 'b' }}",
        "split": "{{ message.content.split('a')[-1] }}",
        "escape": "{{ message.content | escape }}",
        "characters": "{{ message.content | list }}",
        "hash": "{{ {'a': 1}[message.content] is defined }}",
        "join": "{{ [message.content] | join(',') }}",
        "strip of characters": "{{ message.content.strip('a') }}",
        "autoescape": "{% autoescape true %}{{ message.content }}{% endautoescape %}",
        "same": "{{ message.content is sameas 'a' }}",
        "random": "{{ ['a'] | random }}{{ message.content }}",
        "recursive": "{% for x in [message.content] recursive %}{{ x }}{% endfor %}",
    }.items()
}
