"""Small chat templates, each in the style of a family of models: its markers, its turns of phrase.

Where they differ is what a frontend has to get right: who is told of functions and how, whether
arguments are objects or text, who opens a thought.
"""

# ruff: noqa: RUF001 - the markers of DeepSeek have full-width bars
from __future__ import annotations

HERMES = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if thought and loop.index0 > ns.last %}
            {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now('%d %b %Y') %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n' }}
{%- if messages[0]['role'] == 'system' %}
    {{- messages[0]['content'] | trim }}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {{- (message.content | tojson) + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
        {%- if tools and loop.first %}
            {%- for tool in tools %}{{- (tool | tojson(indent=4)) + '\\n\\n' }}{%- endfor %}
        {%- endif %}
        {{- (message.content | trim) + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
{#- <|python_tag|> begins code #}
"""

_DEEPSEEK = """\
{%- set ns = namespace(system='', tool=false) %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{%- set ns.system = message['content'] %}{%- endif %}
{%- endfor %}
{{- bos_token + ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- set ns.tool = false %}
        {{- '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' and message['content'] is none %}
        {{- '<｜Assistant｜>SHUT<｜tool▁calls▁begin｜>' }}
        {%- for tool in message['tool_calls'] %}
            {{- CALL }}
        {%- endfor %}
        {{- '<｜tool▁calls▁end｜>' + eos_token }}
    {%- elif message['role'] == 'assistant' %}
        {%- set content = message['content'].split('</think>')[-1] %}
        {{- '<｜Assistant｜>SHUT' + content + eos_token }}
    {%- elif message['role'] == 'tool' %}
        {%- set ns.tool = true %}
        {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.tool %}{{- '<｜Assistant｜>' }}OPEN{%- endif %}
"""

_FENCED = (
    "('' if loop.first else '\\n') + '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' +"
    " tool['function']['name'] + '\\n```json\\n' + tool['function']['arguments'] +"
    " '\\n```<｜tool▁call▁end｜>'"
)
_NAMED = (
    "'<｜tool▁call▁begin｜>' + tool['function']['name'] + '<｜tool▁sep｜>' +"
    " tool['function']['arguments'] + '<｜tool▁call▁end｜>'"
)


def _deepseek(call: str, opened: str, closed: str = "") -> str:
    return _DEEPSEEK.replace("CALL", call).replace("OPEN", opened).replace("SHUT", closed)


DEEPSEEK_V3 = _deepseek(_FENCED, "")
DEEPSEEK_R1 = _deepseek(_FENCED, "{{- '<think>\\n' }}")
DEEPSEEK_V31 = _deepseek(
    _NAMED, "{{- '<think>' if thinking is defined and thinking else '</think>' }}", "</think>"
)

KIMI_K2 = """\
{%- if tools %}
    {{- '<|im_system|>tool_declare<|im_middle|>' + (tools | tojson(separators=(',', ':'))) }}
    {{- '<|im_end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- set name = message.get('name') or message['role'] %}
    {%- if message['role'] == 'tool' %}
        {{- '<|im_system|>' + name + '<|im_middle|>## Return of ' + message.tool_call_id + '\\n' }}
    {%- else %}
        {{- '<|im_' + message['role'] + '|>' + name + '<|im_middle|>' }}
    {%- endif %}
    {{- message['content'] or '' }}
    {%- if message.get('tool_calls') %}
        {{- '<|tool_calls_section_begin|>' }}
        {%- for call in message['tool_calls'] %}
            {{- '<|tool_call_begin|>' + call['id'] + '<|tool_call_argument_begin|>' }}
            {%- set arguments = call['function']['arguments'] %}
            {{- arguments if arguments is string else arguments | tojson }}
            {{- '<|tool_call_end|>' }}
        {%- endfor %}
        {{- '<|tool_calls_section_end|>' }}
    {%- endif %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_assistant|>assistant<|im_middle|>' }}{%- endif %}
"""

STYLES = {
    "hermes": HERMES,
    "llama": LLAMA,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_r1": DEEPSEEK_R1,
    "deepseek_v31": DEEPSEEK_V31,
    "kimi_k2": KIMI_K2,
}

ENDS = {
    "hermes": "<|im_end|>",
    "llama": "<|eot_id|>",
    "deepseek_v3": "<eos>",
    "deepseek_r1": "<eos>",
    "deepseek_v31": "<eos>",
    "kimi_k2": "<|im_end|>",
}
"""What ends an assistant's turn; <eos> is the eos_token that tests give."""
