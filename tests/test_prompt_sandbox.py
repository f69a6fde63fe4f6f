"""Untrusted templates: known ways out of Jinja's sandbox, and templates that never end, against errors."""

import pytest

from hf_peft_ext.prompts.sandbox import MAX_SOURCE

from .test_prompts import ROW, template


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ text['__class__'] }}",
        "{{ text['__cla' 'ss__']['__mro__'] }}",
        "{{ text[key] }}",
        "{{ text[key][mro][1] }}",
        "{{ text | attr('__class__') }}",
        "{{ [text] | map(attribute='__class__') | first }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ self }}",
        "{{ loop }}",
        "{{ '{0.__class__}'.format(text) }}",
        "{{ '{0.__class__}' | format(text) }}",
        "{{ '%s' % text }}",
        "{{ text.upper }}",
        "{{ text.upper() }}",
        "{{ namespace(a=1) }}",
        "{{ lipsum(10000) }}",
        "{{ config }}",
        "{{ options.append(1) }}",
        "{% set x = 1 %}",
        "{% with x = 1 %}{% endwith %}",
        "{% import 'os' as os %}",
        "{% from 'os' import system %}",
        "{% include '/etc/passwd' %}",
        "{% extends 'base' %}",
        "{% block a %}{% endblock %}",
        "{% macro a() %}{{ a() }}{% endmacro %}",
        "{% call x() %}{% endcall %}",
        "{% filter upper %}a{% endfilter %}",
        "{% autoescape true %}{% endautoescape %}",
        "{% for a in options recursive %}{{ loop(a) }}{% endfor %}",
        "{{ options | tojson }}",
        "{{ text | random }}",
        "{{ none }}",
        "{{ options }}",
    ],
)
def test_attacks_are_refused(source):
    """Each either when the template is made, or when it meets a row; always as a ValueError that says where."""
    row = {**ROW, "key": "__class__", "mro": "__mro__"}
    with pytest.raises(ValueError, match=r"^`prompt` of template 'mine' (must not hold|cannot be rendered: )"):
        template(source).render(row)


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("{{ 'a' * 1000000000 }}", "must not hold Jinja's Mul"),
        ("{{ 10 ** 10 ** 10 }}", "must not hold Jinja's Pow"),
        ("{{ text ~ text }}", "must not hold Jinja's Concat"),
        ("{{ '%1000000000d' % 1 }}", "must not hold Jinja's Mod"),
        ("{% for a in range(999999999) %}{% endfor %}", "must not hold Jinja's Call"),
        ("{{ text | center(1000000000) }}", "must not hold the filter 'center'"),
        ("{{ text" + " | replace('i', text)" * 30 + " }}", "its text has more than 1,000,000 characters"),
        ("{{ options | join(long) }}" * 4, "its text has more than 1,000,000 characters"),
        ("{{ long }}" * 4, "its text has more than 1,000,000 characters"),
        ("{% for a in long %}" * 12 + "{% endfor %}" * 12, "its loops have more than 1,000 passes"),
        ("{% for a in long %}{{ loop.length }}{% endfor %}", "its loops have more than 1,000 passes"),
        ("{% for a in options %}" * 40 + "{% endfor %}" * 40, "is nested too deeply"),
        ("{{ " + "(" * 4000 + "1" + ")" * 4000 + " }}", "is nested too deeply"),
        ("{{ " + "-" * 4000 + "1 }}", "is nested too deeply"),
        ("a" * (MAX_SOURCE + 1), "must have at most 10,000 characters, not 10,001"),
    ],
)
def test_templates_are_bounded(source, rule):
    """In what they make, in how often they go round, and in how long they are."""
    with pytest.raises(ValueError, match=rule):
        template(source).render({**ROW, "long": "a" * 300_000})
