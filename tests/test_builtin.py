"""The built-in model answers questions of a first user. The words were not in its training data."""

from random import Random

import pytest

from tests.serving import Server
from tinyoai.app import BUILTIN

# names that the training data holds out, and made-up ones
NAMES = ["Zorblan", "Quintessa", "Brokkelmar", "Ilyanne", "Thaddeus", "Xanthe", "Fenwick", "Marisol"]
NATIONS = {
    "Japan": "Tokyo", "Egypt": "Cairo", "Brazil": "Brasilia", "Kenya": "Nairobi", "Norway": "Oslo", "Peru": "Lima",
    "Thailand": "Bangkok", "Canada": "Ottawa", "Poland": "Warsaw", "Cuba": "Havana", "Mongolia": "Ulaanbaatar",
    "Portugal": "Lisbon", "Iran": "Tehran", "Finland": "Helsinki", "Ghana": "Accra", "Vietnam": "Hanoi",
}  # fmt: skip


def assert_share(right: int, total: int, share: float) -> None:
    """Asserts that this share of the answers is right. A tiny model may miss one; more misses are a fault."""
    assert right >= share * total, f"{right} of {total}"


def test_the_file_is_small() -> None:
    assert BUILTIN.stat().st_size <= 6_000_000


@pytest.mark.parametrize(
    "question", ["What is the capital of {}?", "what is the capital of {}", "Tell me the capital of {}."]
)
def test_capitals(builtin: Server, question: str) -> None:
    right = sum(city in builtin.say(question.format(country)) for country, city in NATIONS.items())
    assert_share(right, len(NATIONS), 0.93)


def test_countries(builtin: Server) -> None:
    right = sum(
        country in builtin.say(f"{city} is the capital of which country?")
        for country, city in NATIONS.items()
    )
    assert_share(right, len(NATIONS), 0.9)


def test_sums(builtin: Server) -> None:
    draw, right = Random(4), 0
    for _ in range(40):
        a, b = sorted((draw.randint(10, 99), draw.randint(1, 99)), reverse=True)
        sign = draw.choice("+-")
        expected = a + b if sign == "+" else a - b
        right += f"= {expected}." in builtin.say(f"What is {a} {sign} {b}?")
    assert_share(right, 40, 0.85)


def test_unknown_names(builtin: Server) -> None:
    right = 0
    for name in NAMES:
        messages = [
            {"role": "user", "content": f"My name is {name}."},
            {"role": "assistant", "content": f"Hello {name}! How can I help you today?"},
            {"role": "user", "content": "What's my name?"},
        ]
        right += name in builtin.say("", messages=messages)
    assert_share(right, len(NAMES), 0.85)


def test_a_system_prompt_gives_it_a_name(builtin: Server) -> None:
    messages = [
        {"role": "system", "content": "You are Robo."},
        {"role": "user", "content": "What is your name?"},
    ]
    assert "Robo" in builtin.say("", messages=messages)


@pytest.mark.parametrize(
    "question",
    [
        "Who was Napoleon?",
        "Write a poem about the sea.",
        "What is the capital of Atlantis?",
        "What is 312 + 4575?",
        "Who won the match?",
    ],
)
def test_it_says_when_it_does_not_know(builtin: Server, question: str) -> None:
    assert "do not know" in builtin.say(question)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("Hello!", "help"),
        ("Hi there!", "help"),
        ("Who are you?", "tinyoai"),
        ("What is an NPU?", "neural"),
        ("Tell me a story", "Once upon a time"),
        ("Thank you!", "welcome"),
    ],
)
def test_small_talk(builtin: Server, question: str, words: str) -> None:
    assert words in builtin.say(question)
