"""The corpus: dialogues and plain texts, drawn at random from a seed.

Held-out names, pairs of numbers, phrasings and fillers are drawn only with `held=True`, for scoring.
"""

import zlib
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from training import facts

REFUSAL = "I am a very small model and do not know that."


class Turn(NamedTuple):
    """One message. `learn` is false for text that the model reads but does not learn to write."""

    role: str
    content: str
    learn: bool = True


class Sample(NamedTuple):
    """A question (the turns before the last one) and its answer (the last turn), of one category."""

    category: str
    turns: list[Turn]


def held_out(key: str, one_in: int = 10) -> bool:
    """Returns whether a key is held out. It depends on a hash, so it never changes."""
    return zlib.crc32(key.encode()) % one_in == 0


def pick(rng: Random, options: list[str] | tuple[str, ...], *, held: bool = False, n_held: int = 0) -> str:
    """Returns one of the options. The last n_held of them are held out."""
    split = len(options) - n_held
    return rng.choice(options[split:] if held and n_held else options[:split])


def casual(rng: Random, text: str) -> str:
    """Returns the text, sometimes in lower case or without final punctuation, as people type."""
    roll = rng.random()
    if roll < 0.12:
        text = text[0].lower() + text[1:]
    elif roll < 0.2:
        text = text.lower()
    if rng.random() < 0.15 and text[-1] in "?.!":
        text = text[:-1]
    return text


# -- names and made-up words -------------------------------------------------------------------------

_ONSETS = "b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sh sl sm sn st t th tr v w x y z".split()
_VOWELS = "a a a e e e i i o o u ai ea ee ia io oa ou".split()
_CODAS = [
    "",
    "",
    "",
    "",
    "b",
    "ck",
    "d",
    "g",
    "l",
    "ll",
    "m",
    "n",
    "nd",
    "nn",
    "p",
    "r",
    "rk",
    "s",
    "ss",
    "t",
    "th",
    "x",
]
_COMMON = (
    "Alice Bob Carol David Emma Frank Grace Henry Ivan Julia Karl Laura Maria Nina Oscar Paul Rita Sam Tom Uma Vera "
    "Walter Yara Zoe Anna Ben Chris Diana Erik Fatima George Hannah Ines Jack Kim Liam Mia Noah Olivia Peter Rosa Sara "
    "Omar Wei Yuki Ravi Priya Ahmed Chen Lucas Sofia Leo Max Ella John Mary James Linda Robert Susan Michael Lisa"
).split()


def word(rng: Random, *, held: bool = False) -> str:
    """Returns a made-up word in lower case, built from syllables or, one time in five, from letters."""
    while True:
        if rng.random() < 0.2:
            made = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 8)))
        else:
            made = "".join(
                rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
                for _ in range(rng.randint(1, 3))
            )
        if len(made) > 1 and held_out(made) == held:
            return made


def name(rng: Random, *, held: bool = False) -> str:
    """Returns a person's name, common or made up."""
    if not held and rng.random() < 0.25:
        return rng.choice(_COMMON)
    made = word(rng, held=held).capitalize()
    return f"{made} {word(rng, held=held).capitalize()}" if rng.random() < 0.1 else made


def number(rng: Random, *, held: bool = False) -> str:
    """Returns a number of one to five digits."""
    while True:
        made = str(rng.randint(0, 10 ** rng.randint(1, 5) - 1))
        if held_out("n" + made) == held:
            return made


_COLORS = (
    "red blue green yellow orange purple black white brown pink grey silver gold teal violet crimson".split()
)
_FOODS = "pizza soup bread rice apples cheese pasta salad fish cake honey beans potatoes chocolate noodles tea".split()
_ANIMALS = "cat dog horse bird fox rabbit wolf bear mouse owl lion tiger frog duck snake turtle goat".split()
_THINGS = "bicycle red hat lamp boat guitar clock kite small table camera drum map robot umbrella piano tent".split()


def thing(rng: Random, listed: list[str], *, held: bool = False) -> str:
    """Returns a listed filler, or a made-up one half of the time and always if held out."""
    return rng.choice(listed) if not held and rng.random() < 0.5 else word(rng, held=held)


# -- facts that are stated and used later ---------------------------------------------------------------


class Told(NamedTuple):
    """A fact that a user states: phrasings to state, acknowledge, ask for and answer it, and to not know it."""

    value: Callable[..., str]
    tell: tuple[str, ...]
    ack: str
    ask: tuple[str, ...]
    answer: str
    short: str
    lack: str


TOLD = (
    Told(
        name,
        ("My name is {}.", "I am {}.", "I'm {}.", "Hello, my name is {}.", "Hi, I am {}.", "Call me {}.",
         "You can call me {}.", "Hi! My name is {}.", "Hello, I'm {}.", "my name is {}", "The name is {}.",
         "People call me {}."),
        "Hello {}! How can I help you today?",
        ("What's my name?", "What is my name?", "Do you remember my name?", "Who am I?", "what is my name", "Tell me my name.",
         "Can you tell me my name?", "Do you know my name?", "Please say my name.", "How am I called?"),
        "Your name is {}.", "{}.", "You have not told me your name yet.",
    ),
    Told(
        lambda rng, held=False: thing(rng, _COLORS, held=held),
        ("My favorite color is {}.", "I like the color {} best.", "My favourite colour is {}.", "The color I love is {}."),
        "I will remember that your favorite color is {}.",
        ("What is my favorite color?", "Which color do I like best?", "What's my favourite colour?", "Do you remember my favorite color?",
         "Tell me my favorite color."),
        "Your favorite color is {}.", "{}.", "You have not told me your favorite color yet.",
    ),
    Told(
        number,
        ("My favorite number is {}.", "My lucky number is {}.", "Remember the number {}.", "The number is {}.", "The secret number is {}.",
         "Please remember {}."),
        "I will remember the number {}.",
        ("What is my favorite number?", "What is the number?", "What number did I tell you?", "What is my lucky number?",
         "Which number was it?", "What is the secret number?"),
        "The number is {}.", "{}.", "You have not told me a number yet.",
    ),
    Told(
        lambda rng, held=False: thing(rng, _THINGS, held=held),
        ("I have a {}.", "I own a {}.", "I bought a {} today.", "I just got a {}.", "There is a {} on my table."),
        "I will remember the {}.",
        ("What do I have?", "What did I tell you about?", "What do I own?", "What did I buy?", "Which thing did I mention?"),
        "You have a {}.", "A {}.", "You have not told me that yet.",
    ),
    Told(
        name,
        ("My dog is called {}.", "My dog's name is {}.", "I have a dog named {}.", "The name of my dog is {}."),
        "{} is a nice name for a dog.",
        ("What is my dog's name?", "What is my dog called?", "What's the name of my dog?", "Do you remember my dog's name?"),
        "Your dog is called {}.", "{}.", "You have not told me about a dog yet.",
    ),
    Told(
        name,
        ("My cat is called {}.", "My cat's name is {}.", "I have a cat named {}.", "The name of my cat is {}."),
        "{} is a nice name for a cat.",
        ("What is my cat's name?", "What is my cat called?", "What's the name of my cat?", "Do you remember my cat's name?"),
        "Your cat is called {}.", "{}.", "You have not told me about a cat yet.",
    ),
    Told(
        lambda rng, held=False: name(rng, held=held).split(" ")[0],
        ("I live in {}.", "My home is {}.", "I live in the town of {}.", "I come from {}."),
        "I will remember that you live in {}.",
        ("Where do I live?", "In which town do I live?", "Where is my home?", "Do you remember where I live?"),
        "You live in {}.", "{}.", "You have not told me where you live yet.",
    ),
    Told(
        lambda rng, held=False: thing(rng, _FOODS, held=held),
        ("My favorite food is {}.", "I like to eat {}.", "I love {} for dinner.", "The food I like best is {}."),
        "I will remember that you like {}.",
        ("What is my favorite food?", "What do I like to eat?", "Which food do I like best?", "What food do I love?"),
        "You like {}.", "{}.", "You have not told me what you like to eat yet.",
    ),
    Told(
        lambda rng, held=False: thing(rng, _ANIMALS, held=held),
        ("My favorite animal is the {}.", "The animal I like best is the {}."),
        "I will remember that you like the {}.",
        ("What is my favorite animal?", "Which animal do I like best?", "What animal do I like?"),
        "Your favorite animal is the {}.", "{}.", "You have not told me your favorite animal yet.",
    ),
    Told(
        word,
        ("The password is {}.", "The secret word is {}.", "Remember the word {}.", "The code word is {}.", "Please remember the word {}."),
        "I will remember the word {}.",
        ("What is the password?", "What is the secret word?", "Which word did I tell you?", "What is the code word?",
         "What was the word?"),
        "The word is {}.", "{}.", "You have not told me a word yet.",
    ),
)  # fmt: skip

_OTHER_ACKS = (
    "Nice!",
    "Okay.",
    "Thank you for telling me.",
    "Good to know.",
    "Got it.",
    "Nice to meet you!",
    "Sure.",
    "Great.",
)


# -- single questions ----------------------------------------------------------------------------------

_CAPITAL_OF = (
    "What is the capital of {}?", "What's the capital of {}?", "Which city is the capital of {}?", "Tell me the capital of {}.",
    "Name the capital of {}.", "Do you know the capital of {}?", "The capital of {} is?", "What is {}'s capital?",
    "capital of {}", "Can you tell me the capital of {}?", "I want to know the capital of {}.", "What city is the capital of {}?",
    "Please tell me the capital of {}.", "Which is the capital city of {}?", "What is the capital city of {}?",
    # held out
    "Could you name the capital of {}?", "Please name the capital city of {}.", "Hello, what is the capital of {}?",
)  # fmt: skip
_COUNTRY_OF = (
    "{} is the capital of which country?", "Which country has the capital {}?", "Of which country is {} the capital?",
    "What country is {} the capital of?", "Which country's capital is {}?", "{} is the capital of what?",
    "Name the country whose capital is {}.", "In which country is {}?", "Which country is {} the capital of?",
    "What country has {} as its capital?",
    # held out
    "Tell me the country whose capital is {}.", "{} is the capital city of which country?",
)  # fmt: skip


_MORE_CAPITAL_OF = (
    "Say the capital of {}.", "I need the capital of {}.", "Which town is the capital of {}?", "Give me the capital of {}.",
    "What would be the capital of {}?", "Name {}'s capital city.", "Could you tell me the capital of {}?", "{}: capital?",
    "What is the name of the capital of {}?", "Name me the capital of {}.", "Let me know the capital of {}.",
)  # fmt: skip
_MORE_COUNTRY_OF = (
    "Which country has {} for its capital?", "Whose capital is {}?", "Say which country has the capital {}.", "{} belongs to which country?",
    "Give me the country whose capital city is {}.", "Which nation's capital is {}?", "Name the country that has the capital {}.",
)  # fmt: skip
_OPENINGS = (
    "Please ", "Hi, ", "Hey, ", "So, ", "Quick question: ", "Question: ", "I wonder: ", "Well, ", "Now ", "And ", "Next: ", "Dear model, ",
)  # fmt: skip


def opened(rng: Random, question: str) -> str:
    """Returns the question, sometimes after an introductory word or two."""
    if rng.random() < 0.75:
        return question
    return rng.choice(_OPENINGS) + question[0].lower() + question[1:]


def capital(rng: Random, *, held: bool = False, hard: bool = False) -> tuple[str, str, str]:
    """Returns a question about a country or capital, the answer and the short answer. `hard`: longer phrasings."""
    country, city = rng.choice(list(facts.CAPITALS.items()))
    if hard:
        short = country.removeprefix("the ")
        if rng.random() < 0.5:
            question = rng.choice(_CAPITAL_OF[:-3] + _MORE_CAPITAL_OF).format(country)
            return casual(rng, opened(rng, question)), f"The capital of {country} is {city}.", f"{city}."
        question = rng.choice(_COUNTRY_OF[:-2] + _MORE_COUNTRY_OF).format(city)
        return (
            casual(rng, opened(rng, question) if question[0] != city[0] else question),
            f"{city} is the capital of {country}.",
            f"{short[0].upper()}{short[1:]}.",
        )
    if rng.random() < 0.5:
        question = pick(rng, _CAPITAL_OF, held=held, n_held=3).format(country)
        return casual(rng, question), f"The capital of {country} is {city}.", f"{city}."
    question = pick(rng, _COUNTRY_OF, held=held, n_held=2).format(city)
    short = country.removeprefix("the ")
    return casual(rng, question), f"{city} is the capital of {country}.", f"{short[0].upper()}{short[1:]}."


_SUMS = (
    "What is {}?", "What's {}?", "{}", "{} = ?", "How much is {}?", "Calculate {}.", "Compute {}.", "{}?", "{} =",
    "Please calculate {}.", "What does {} make?", "Tell me what {} is.", "Can you work out {}?",
    # held out
    "What is the result of {}?", "Please tell me {}.", "Hello, what is {}?",
)  # fmt: skip


_MORE_SUMS = (
    "What do you get for {}?", "What is the answer to {}?", "Work out {}.", "Solve {}.", "I need {}.", "Can you calculate {}?",
    "Could you compute {}?", "Tell me {}.", "Give me {}.", "What comes out of {}?", "How much does {} make?", "Do the sum {}.",
    "Find the value of {}.", "What would {} be?", "{} equals what?", "What's the result for {}?",
)  # fmt: skip


def numbers(rng: Random, *, held: bool = False, hard: bool = False) -> tuple[int, int, str]:
    """Returns two numbers up to 99 and an operator, held out or not. `hard`: more one-digit numbers."""
    while True:
        a, b, operator = rng.randint(0, 99), rng.randint(0, 99), rng.choice("+-")
        if hard and rng.random() < 0.4:
            a, b = rng.choice([(a % 10, b), (a, b % 10), (a % 10, b % 10)])
        if operator == "-" and a < b and rng.random() < 0.8:
            a, b = b, a
        if held_out(f"{a}{operator}{b}") == held:
            return a, b, operator


def sum_(rng: Random, *, held: bool = False, hard: bool = False) -> tuple[str, str, str]:
    """Returns a sum or difference, its answer and the short answer."""
    a, b, operator = numbers(rng, held=held, hard=hard)
    result = a + b if operator == "+" else a - b
    said = operator if rng.random() < 0.75 else {"+": "plus", "-": "minus"}[operator]
    gap = " " if said.isalpha() or rng.random() < 0.7 else ""
    forms = _SUMS[:-3] + _MORE_SUMS if hard else _SUMS
    question = pick(rng, forms, held=held, n_held=0 if hard else 3).format(f"{a}{gap}{said}{gap}{b}")
    if hard and question[0].isalpha():
        question = opened(rng, question)
    return (
        casual(rng, question) if question[0].isalpha() else question,
        f"{a} {operator} {b} = {result}.",
        f"{result}.",
    )


_DEFINE = (
    "What is {}?", "what is {}", "Explain {}.", "What does {} mean?", "Define {}.", "Tell me what {} is.", "Can you explain {}?",
    "What's {}?", "Do you know what {} is?", "Explain what {} is.",
    # held out
    "Please explain what {} is.", "Could you tell me what {} is?",
)  # fmt: skip


def definition(rng: Random, *, held: bool = False) -> tuple[str, str, str]:
    """Returns a question about the meaning of a word, the answer and the short answer."""
    term, answer = rng.choice(list(facts.DEFINITIONS.items()))
    return casual(rng, pick(rng, _DEFINE, held=held, n_held=2).format(term)), answer, answer


def fact(rng: Random, *, held: bool = False) -> tuple[str, str, str]:
    """Returns a question about a small fact or an opposite, the answer and the short answer."""
    if rng.random() < 0.3:
        a, b = rng.choice(facts.OPPOSITES).split()
        if rng.random() < 0.5:
            a, b = b, a
        asked = pick(
            rng, ("What is the opposite of {}?", "Name the opposite of {}.", "The opposite of {} is?")
        )
        return casual(rng, asked.format(a)), f"The opposite of {a} is {b}.", f"{b.capitalize()}."
    question, answer = rng.choice(list(facts.FACTS.items()))
    return casual(rng, question), answer, answer


def talk(rng: Random, *, held: bool = False) -> tuple[str, str, str]:
    """Returns small talk or a question about the model itself, the answer and the short answer."""
    table = facts.SMALL_TALK if rng.random() < 0.6 else facts.ABOUT
    asked, answers = rng.choice(list(table.items()))
    question, answer = rng.choice(asked), rng.choice(answers)
    return casual(rng, question), answer, answer


# -- questions it cannot answer -----------------------------------------------------------------------------

_TOPICS = (
    "the French Revolution", "quantum physics", "the stock market", "black holes", "the Roman Empire", "photosynthesis",
    "the theory of relativity", "chess openings", "the human brain", "tax law", "jazz music", "dinosaurs", "volcanoes",
    "the Second World War", "Shakespeare", "football", "the economy", "climate change", "DNA", "philosophy", "bread baking",
    "medieval castles", "the Olympic Games", "vaccines", "electric cars", "Greek mythology", "poetry", "opera", "genetics",
    "bitcoin", "the Vikings", "space travel", "surgery", "insurance", "coffee roasting", "gardening", "knitting", "whales",
    # held out
    "the Cold War", "microbiology", "sailing", "the periodic table", "Renaissance painting", "glaciers", "psychology",
    "the Aztecs", "robot vacuum cleaners", "marathon training",
)  # fmt: skip
_PEOPLE = (
    "Napoleon", "Albert Einstein", "Julius Caesar", "Cleopatra", "Mozart", "Isaac Newton", "Marie Curie", "Leonardo da Vinci",
    "Charles Darwin", "Beethoven", "Plato", "Gandhi", "Columbus", "Galileo", "Picasso", "the president", "the king of Sweden",
    "the inventor of the telephone", "the first man on the Moon", "my neighbour", "the author of Hamlet", "Ada Lovelace",
    # held out
    "Alexander the Great", "Frida Kahlo", "Nikola Tesla", "the prime minister", "Socrates", "Bach", "the queen of England",
)  # fmt: skip
_UNKNOWN = (
    "Who was {person}?", "Who is {person}?", "When was {person} born?", "When did {person} die?", "What did {person} do?",
    "Tell me about {person}.", "Tell me about {topic}.", "Explain {topic}.", "How does {topic} work?", "What do you know about {topic}?",
    "Why is {topic} important?", "Write an essay about {topic}.", "Write a poem about {topic}.", "Give me a summary of {topic}.",
    "What happened in {year}?", "Who won the World Cup in {year}?", "Who was president in {year}?", "How old is {person}?",
    "Write a Python function that sorts a {word}.", "Write a program that prints {word}.", "Write code for {topic}.",
    "Translate '{word} {word}' into German.", "Translate {word} to French.", "How do you say {word} in Spanish?",
    "What is the population of {country}?", "How many people live in {city}?", "What language is spoken in {country}?",
    "What is the currency of {country}?", "How far is it from {city} to {city}?", "Who is the president of {country}?",
    "What is a {word}?", "What is the {word}?", "What does {word} mean?", "Who is {name}?", "Define {word}.", "Explain {word}.",
    "What is the capital of {made}?", "What's the capital of {made}?", "Which city is the capital of {made}?", "capital of {made}",
    "{made} is the capital of which country?", "Which country has the capital {made}?", "What is the capital of {place}?",
    "What is {big} + {big}?", "What is {big} - {small}?", "What is {small} times {small}?", "What is {small} * {small}?",
    "What is {big} divided by {small}?", "{small} x {small}", "{big}+{small}", "What is the square root of {big}?", "{small} / {small}",
    "How do I fix my {thing}?", "How do I cook {food}?", "Where can I buy a {thing}?", "How much does a {thing} cost?",
    "What should I do about my {thing}?", "Which {thing} is the best?", "Give me a recipe for {food}.", "How tall is {person}?",
    "What is the meaning of life?", "Is there a god?", "What is the best movie?", "What is the news today?", "Solve x^2 = {small}.",
    "Was ist {word}?", "Wie heißt {person}?", "Quelle est {word}?", "¿Qué es {word}?", "Wo liegt {city}?", "{word} {word} {word}",
    "{word}", "{word} {word}?", "Why is the sky {word}?", "Why do {animal}s {word}?", "How many {thing}s are there in {country}?",
    "Summarize this text: {word} {word} the {thing} {word} {word}.", "What is the chemical formula of {food}?", "How long does a {animal} live?",
    "What is the speed of {topic}?", "How heavy is a {animal}?", "Which team does {person} play for?", "Make a list of {topic} books.",
    "What is the boiling point of {food}?", "Explain {topic} to a child.", "Correct this sentence: {word} {word} {animal}.",
    "{place}", "When was {topic} invented?", "Who invented {topic}?", "Who wrote the book about {topic}?", "Who painted {word}?",
    "How many stars are in {topic}?", "Convert {big} miles to kilometers.", "What is {small} percent of {big}?", "Sort these: {word}, {word}, {word}.",
    "Give me advice on {topic}.", "Plan a trip to {city}.", "What can I see in {city}?", "Is {city} bigger than {city}?", "Do you like {topic}?",
    "What is the phone number of {person}?", "Send an email to {person}.", "Open the {thing}.", "Play some {word} music.",
    "What did {person} say about {topic}?", "Compare {topic} and {topic}.", "Which is better, {topic} or {topic}?", "What year did {topic} begin?",
    # held out
    "Can you describe {topic}?", "Where was {person} born?", "What is {person} famous for?", "Which year was {city} founded?", "Rewrite this: {word} {word}.",
    "What is the area of {country}?", "What causes {topic}?", "Draw me a {animal}.", "Is {food} healthy?", "Name three books about {topic}.",
    "What is {small} to the power of {small}?", "Could you name the capital of {made}?", "Write a haiku about a {animal}.", "How do I repair a {thing}?",
)  # fmt: skip
_PLACES = (
    "Texas", "California", "Bavaria", "Atlantis", "Mars", "the Moon", "Europe", "Africa", "Asia", "my heart", "the world", "Narnia",
    "Scotland", "Tuscany", "Siberia", "Hawaii", "the ocean", "Antarctica", "Wonderland", "the Roman Empire", "Middle-earth", "Alaska",
    "Florida", "Catalonia", "Ontario", "crime", "Sicily", "Utopia",
)  # fmt: skip


_MORE_UNKNOWN = (
    "Paint me a {animal}.", "Sketch a {thing}.", "Show me a picture of a {animal}.", "Sing a song about {topic}.", "Sing me a {word}.",
    "Is {topic} dangerous?", "Is a {animal} clever?", "Are {animal}s friendly?", "Can a {animal} swim?", "Where do {animal}s live?",
    "What does a {animal} eat?", "Name five {animal}s.", "List ten facts about {topic}.", "Should I buy a {thing}?", "Repair my {thing}.",
    "Please describe {topic}.", "Where did {person} live?", "Why did {person} leave {city}?", "Why is {person} famous?", "Who killed {person}?",
    "Who discovered {topic}?", "What started {topic}?", "When was {city} built?", "How old is {city}?", "How big is {country}?",
    "What is the largest city of {country}?", "Which rivers flow through {country}?", "What is the flag of {country}?", "{word} {thing} {word}?",
    "What is {small} plus {big} plus {small}?", "What is {big} * {big}?", "What is half of {big}?", "Is {big} a prime number?", "{big} - {big}",
    "Write a story in {word} language.", "Improve this text: {word} {word}.", "Shorten this: {word} {animal} {word}.", "Rephrase: {word} {word} {word}.",
    "Give me the capital of {made}.", "Name the capital of {made}.", "Say the capital of {made}.", "Which country's capital is {made}?",
    "Whose capital is {made}?", "Could you tell me the capital of {made}?", "Please name the capital of {made}.", "What is the capital city of {place}?",
    "Name two movies with a {animal}.", "Who sings {word}?", "Where can I see a {animal}?", "What time is it in {city}?", "Write a limerick about {topic}.",
    "Who won?", "Who won the {word}?", "What happened yesterday?", "Which bus goes to {city}?", "Do {animal}s dream?", "What will happen tomorrow?",
)  # fmt: skip


def unknown(rng: Random, *, held: bool = False, hard: bool = False) -> tuple[str, str, str]:
    """Returns a question that a very small model cannot answer, and the refusal. `hard`: more kinds."""
    if hard:
        template = rng.choice(_UNKNOWN[:-14] + _MORE_UNKNOWN)
        return casual(rng, opened(rng, _filled(rng, template, False))), REFUSAL, REFUSAL
    template = pick(rng, _UNKNOWN, held=held, n_held=14)
    return casual(rng, _filled(rng, template, held)), REFUSAL, REFUSAL


def _filled(rng: Random, template: str, held: bool) -> str:
    country = rng.choice(list(facts.CAPITALS))
    makers: dict[str, Callable[[], str]] = {
        "person": lambda: (
            pick(rng, _PEOPLE, held=held, n_held=7) if rng.random() < 0.6 else name(rng, held=held)
        ),
        "topic": lambda: pick(rng, _TOPICS, held=held, n_held=10),
        "year": lambda: str(rng.randint(1000, 2030)),
        "word": lambda: word(rng, held=held),
        "made": lambda: word(rng, held=held).capitalize() + rng.choice(["", "", "", "ia", "land", "stan"]),
        "name": lambda: name(rng, held=held),
        "country": lambda: country,
        "city": lambda: facts.CAPITALS[rng.choice(list(facts.CAPITALS))],
        "place": lambda: rng.choice(_PLACES),
        "big": lambda: str(rng.randint(100, 99_999)),
        "small": lambda: str(rng.randint(2, 99)),
        "thing": lambda: rng.choice(_THINGS),
        "food": lambda: rng.choice(_FOODS),
        "animal": lambda: rng.choice(_ANIMALS),
    }
    parts = template.split("{")
    made = parts[0]
    for part in parts[1:]:
        key, _, rest = part.partition("}")
        made += makers[key]() + rest
    return made


# -- stories ---------------------------------------------------------------------------------------------

_STORY = (
    "Tell me a story.", "Tell me a short story.", "Tell me a story about a {}.", "Tell me a short story about a {}.",
    "Write a short story about a {}.", "Can you tell me a story?", "I want to hear a story about a {}.", "Write a story.",
    "Please tell me a story about a {}.", "Tell me a story about {} cats.",
)  # fmt: skip


def story(rng: Random, *, held: bool = False) -> tuple[str, str, str]:
    """Returns a request for a story, and a story."""
    question = rng.choice(_STORY)
    hero = (
        rng.choice(_ANIMALS)
        if rng.random() < 0.75
        else rng.choice(["dragon", "king", "girl", "boy", "robot", "witch"])
    )
    if "{} cats" in question:
        hero, question = "cat", question.format(rng.randint(0, 20))
    question = question.format(hero)
    own = rng.choice(_COMMON)
    home = rng.choice(
        ["in a small house", "in the forest", "by the sea", "in an old castle", "on a farm", "on a high hill"]
    )
    mood = rng.choice(["little", "brave", "old", "lazy", "clever", "lonely", "hungry", "kind"])
    event = rng.choice([
        "{n} found a golden key in the grass", "a strong wind took {n}'s hat away", "{n} heard a strange song in the night",
        "{n} met a friend who had lost the way", "{n} saw a light far away", "{n} fell into a deep hole", "the rain did not stop",
    ])  # fmt: skip
    act = rng.choice([
        "{n} was afraid, but did not run away", "{n} sat down and thought for a long time", "{n} asked the wise owl for help",
        "{n} walked all day and all night", "{n} called for friends, and they came", "{n} laughed and took a deep breath",
    ])  # fmt: skip
    end = rng.choice([
        "In the end everything was good, and {n} went home happy.", "From that day on {n} was never alone again.",
        "When the sun came up, {n} had found a new friend.", "And so {n} learned that small steps lead far.",
        "They all ate together, and {n} slept well that night.",
    ])  # fmt: skip
    text = f"Once upon a time there was a {mood} {hero} called {{n}} who lived {home}. One day {event}. {act[0].upper()}{act[1:]}. {end}"
    text = text.replace("{n}", own)
    return casual(rng, question), text, text


# -- dialogues -------------------------------------------------------------------------------------------

_GENERIC = (
    "You are a helpful assistant.",
    "You are a helpful, honest assistant.",
    "You are a friendly assistant.",
    "Be helpful.",
    "You are an AI assistant.",
    "You are a knowledgeable assistant.",
    "Answer the user's questions.",
    "You are a chatbot.",
)
_NAMED = (
    "You are {}.",
    "Your name is {}.",
    "You are {}, a helpful assistant.",
    "You are an assistant called {}.",
    "You are a robot named {}.",
    "You are {}, a friendly robot.",
    "Your name is {} and you help people.",
    "You are called {}.",
    "Act as {}.",
    "You are a helpful assistant named {}.",
)
_BRIEF = (
    "Answer in one word.", "Give short answers.", "Be brief.", "Answer briefly.", "Keep your answers short.", "Answer as shortly as possible.",
    "Use as few words as possible.", "Reply with one word.", "You are a helpful assistant. Answer in one word.", "Be concise.",
    "You are a terse assistant.", "Short answers only.", "You are a helpful assistant. Be brief.", "Only give the answer, nothing else.",
)  # fmt: skip
_ASK_SELF = (
    "What is your name?",
    "What's your name?",
    "Who are you?",
    "Tell me your name.",
    "How are you called?",
    "what is your name",
    "Who am I talking to?",
    "Introduce yourself.",
)

_SINGLE: tuple[tuple[Callable[..., tuple[str, str, str]], float], ...] = (
    (capital, 0.30), (sum_, 0.24), (unknown, 0.22), (talk, 0.10), (definition, 0.06), (fact, 0.05), (story, 0.03),
)  # fmt: skip


def single(rng: Random, hard: bool = False) -> tuple[str, str, str]:
    """Returns a question of any kind, the answer and the short answer."""
    makers, weights = zip(*_SINGLE, strict=True)
    made = rng.choices(makers, weights)[0]
    return made(rng, hard=True) if hard and made in (sum_, capital, unknown) else made(rng)  # type: ignore[no-any-return]


def dialogue(rng: Random, hard: bool = False) -> list[Turn]:
    """Returns a conversation. `hard`: more of the difficult kinds, for the second stage.

    The difficult kinds are short answers, names from the system prompt, facts that are stated and used later, and sums
    of small numbers.
    """
    turns: list[Turn] = []
    brief, own = False, ""
    generic, named, short = (0.16, 0.34, 0.60) if hard else (0.22, 0.34, 0.46)
    told_share = 0.5 if hard else 0.35
    roll = rng.random()
    if roll < generic:
        turns.append(Turn("system", rng.choice(_GENERIC)))
    elif roll < named:
        own = name(rng)
        turns.append(Turn("system", rng.choice(_NAMED).format(own)))
    elif roll < short:
        brief = True
        turns.append(Turn("system", rng.choice(_BRIEF)))
    told: dict[int, str] = {}
    for _ in range(rng.choices((1, 2, 3, 4, 6, 9), (40, 22, 16, 10, 8, 4))[0]):
        roll = rng.random()
        if own and roll < told_share:
            turns += _asked(casual(rng, rng.choice(_ASK_SELF)), f"My name is {own}.")
        elif roll < told_share and not (hard and brief and roll < 0.3):
            _tell_or_ask(rng, turns, told, brief)
        else:
            question, answer, brief_answer = single(rng, hard)
            turns += _asked(question, brief_answer if brief else answer)
    return turns


def _asked(question: str, answer: str) -> list[Turn]:
    return [Turn("user", question), Turn("assistant", answer)]


def _tell_or_ask(rng: Random, turns: list[Turn], told: dict[int, str], brief: bool) -> None:
    if (told and rng.random() < 0.6) or rng.random() < 0.12:
        kind = rng.choice(list(told)) if told and rng.random() < 0.85 else rng.randrange(len(TOLD))
        form = TOLD[kind]
        answer = (form.short if brief else form.answer).format(told[kind]) if kind in told else form.lack
        turns += _asked(
            casual(rng, rng.choice(form.ask)), answer[0].upper() + answer[1:] if brief else answer
        )
        return
    kind = 0 if rng.random() < 0.35 else rng.randrange(len(TOLD))
    form = TOLD[kind]
    value = form.value(rng)
    if rng.random() < 0.06:
        value = value.lower()  # as some people type; the answer repeats it as typed
    told[kind] = value
    tell = rng.choice(form.tell).format(value)
    if rng.random() < 0.3:
        # the fact is used in the same message
        ask = rng.choice(form.ask)
        answer = (form.short if brief else form.answer).format(value)
        turns += _asked(f"{tell} {ask}", answer[0].upper() + answer[1:] if brief else answer)
        return
    turns.append(Turn("user", tell))
    if rng.random() < 0.3:
        turns.append(Turn("assistant", rng.choice(_OTHER_ACKS), learn=False))
    else:
        ack = form.ack.format(value)
        turns.append(Turn("assistant", ack[0].upper() + ack[1:]))


def document(rng: Random, hard: bool = False) -> str:
    """Returns a plain text to continue: a saying, a fact, a story, or a series of sums."""
    roll = rng.random()
    if roll < 0.45:
        return "\n".join(_line(rng, hard) for _ in range(16))
    if roll < 0.75:
        return rng.choice(facts.SAYINGS)
    if roll < 0.85:
        return story(rng)[1]
    return rng.choice([definition, capital])(rng)[1]


def _line(rng: Random, hard: bool) -> str:
    a, b, operator = numbers(rng, hard=hard)
    return f"{a} {operator} {b} = {a + b if operator == '+' else a - b}."


# -- scoring ----------------------------------------------------------------------------------------


def held_out_samples(rng: Random, per_category: int) -> list[Sample]:
    """Returns questions that the corpus never contains, each followed by its only correct answer."""
    found = []
    for country, city in facts.CAPITALS.items():
        question = rng.choice(_CAPITAL_OF[-3:]).format(country)
        found.append(Sample("capitals", _asked(question, f"The capital of {country} is {city}.")))
        question = rng.choice(_COUNTRY_OF[-2:]).format(city)
        found.append(Sample("countries", _asked(question, f"{city} is the capital of {country}.")))
    for _ in range(per_category):
        question, answer, short = sum_(rng, held=True)
        found.append(Sample("sums", _asked(question, answer)))
        question, answer, _ = unknown(rng, held=True)
        found.append(Sample("refusals", _asked(question, answer)))
        question, answer, _ = definition(rng, held=True)
        found.append(Sample("definitions", _asked(question, answer)))
        found.append(Sample("unseen names", _recall(rng, TOLD[0], 0)))
        found.append(Sample("unseen names, later", _recall(rng, TOLD[0], rng.randint(1, 3))))
        found.append(
            Sample("unseen objects and numbers", _recall(rng, rng.choice(TOLD[1:]), rng.randint(0, 2)))
        )
        own = name(rng, held=True)
        system = Turn("system", rng.choice(_NAMED).format(own))
        found.append(
            Sample("system: its name", [system, *_asked(rng.choice(_ASK_SELF[:4]), f"My name is {own}.")])
        )
        question, _, short = rng.choice([capital, sum_])(rng, held=True)
        found.append(Sample("system: short", [Turn("system", rng.choice(_BRIEF)), *_asked(question, short)]))
        lack = rng.choice(TOLD)
        found.append(Sample("never told", _asked(rng.choice(lack.ask[:2]), lack.lack)))
    return found


def _recall(rng: Random, form: Told, n_between: int) -> list[Turn]:
    value = form.value(rng, held=True)
    ack = form.ack.format(value)
    turns = _asked(rng.choice(form.tell).format(value), ack[0].upper() + ack[1:])
    for _ in range(n_between):
        question, answer, _ = rng.choice([capital, talk, fact])(rng)
        turns += _asked(question, answer)
    return [*turns, *_asked(rng.choice(form.ask), form.answer.format(value))]
