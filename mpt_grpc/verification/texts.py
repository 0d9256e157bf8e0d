"""Sample texts and conversations for comparing tokenizers, chat templates and models."""

from __future__ import annotations

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two leading spaces, two trailing  ",
    "no-break\u00a0space, tab\tand\r\nWindows line end\n\n\n",
    "def f(x):\n    return {\n        'key': [x ** 2, -1],\n    }\n",
    "\t\tif (a != b && c <= 0x7F) { return; } // ok?",
    "1234567890 3.14159 -42 1e-9 $1,000.00 50%",
    "it's, we'll, I'm, they've, don't; \u201cquoted\u201d \u2013 and \u2026",
    "camelCase snake_case SHOUTING kebab-case https://example.org/a?b=c#d",
    "Zażółć gęślą jaźń, naïve café, Ångström, Straße",
    "cafe\u0301 with a combining accent, and ﬁ with a ligature",
    "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "敏捷的棕色狐狸跳过懒狗。",
    "いろはにほへと ちりぬるを アイウエオ",
    "키스의 고유조건은 입술끼리 만나야 하고",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "דג סקרן שט בים מאוכזב",
    "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "👩‍👩‍👧‍👦 👍🏽 🇺🇳 \u2603\ufe0f \U0001d518\U0001d52b\U0001d526",
    "zero\u200bwidth \u202eright to left\u202c \ufeffmark",
    "<|endoftext|> and <|im_start|>user<|im_end|> as text",
    "a" * 200 + " " * 70 + "b",
    "",
)

CONVERSATIONS = (
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "The capital of Peru?"}],
    [
        {"role": "user", "content": "  Write {{ x }} & <b>.\n"},
        {"role": "assistant", "content": "{{ x }} & <b>."},
        {"role": "user", "content": "Again, 中文."},
    ],
)

PROMPT = (
    "Once upon a time there was a little girl who lived in a village near the forest. Whenever she went out, the "
    "little girl wore a red riding cloak, so everyone in the village called her Little Red Riding Hood. One "
    "morning, Little Red Riding Hood asked her mother if she could go to visit her grandmother, as it had been a "
    "while since they had seen each other."
)
"""A prompt in plain English, which every model of English finds more likely than random tokens."""
