"""Prompt templates by name; a recipe may give a text of its own with {problem} in it instead.

One idea: there are two places where a problem is wrapped, and each has its key. A source's `template` says what is asked (the
messages, which every teacher and policy sees alike); the policy's `template` says how messages become this one model's text.
It leaves out chat templates: those come with the policy.
"""

PROBLEM = "{problem}"

_THINK = """\
Solve the problem in two parts. First think it through, for as long as you need: try, check, and go back where something is wrong. \
Then write the solution down for a reader, short and complete, and {end} The form is:
<think>
your reasoning
</think>
your solution"""

PROMPTS: dict[str, tuple[str | None, str]] = {  # name -> system message, user message
    "boxed": (None, PROBLEM + "\n\nReason step by step, and put the final answer within \\boxed{}."),
    "letter": (
        None,
        "Answer this multiple-choice question. Reason step by step first; the last line of your response is ANSWER: and the letter "
        "of one option, nothing else.\n\n" + PROBLEM,
    ),
    "think": (_THINK.replace("{end}", "give the final answer within \\boxed{}."), PROBLEM),
    "think_letter": (
        _THINK.replace("{end}", "end it with a line that says ANSWER: and the letter of one option, nothing else."),
        PROBLEM,
    ),
}

THINK = "<think>\n"

TEXTS: dict[str, str] = {  # name -> the text that a model without chat template continues
    "base_think": "User: This is the problem:\n" + PROBLEM + "\nAssistant: " + THINK,
}
CHAT = ("chat", "chat_think")  # through the policy's own chat template
RENDERINGS = (*CHAT, *TEXTS)


def checked(template: str, names: tuple[str, ...]) -> str:
    """The template, if it is one of these names or a text with {problem}; ValueError otherwise."""
    if template not in names and PROBLEM not in template:
        raise ValueError(f"expected {', '.join(names)}, or a text of yours with {PROBLEM} in it, found {template!r}")
    return template


def asked(template: str, problem: str) -> tuple[str | None, str]:
    """The system message (None: none of its own) and the user message that a source's template makes of a problem."""
    system, user = PROMPTS.get(template, (None, template))
    return system, user.replace(PROBLEM, problem)
