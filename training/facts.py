"""Facts that the built-in model learns: countries and capitals, definitions, sayings, small facts.

The data was written for this project.
"""

_CAPITALS = """
Afghanistan:Kabul Albania:Tirana Algeria:Algiers Andorra:Andorra la Vella Angola:Luanda Argentina:Buenos Aires
Armenia:Yerevan Australia:Canberra Austria:Vienna Azerbaijan:Baku Bahrain:Manama Bangladesh:Dhaka
Barbados:Bridgetown Belarus:Minsk Belgium:Brussels Belize:Belmopan Benin:Porto-Novo Bhutan:Thimphu Bolivia:Sucre
Bosnia and Herzegovina:Sarajevo Botswana:Gaborone Brazil:Brasilia Brunei:Bandar Seri Begawan Bulgaria:Sofia
Burkina Faso:Ouagadougou Burundi:Gitega Cambodia:Phnom Penh Cameroon:Yaounde Canada:Ottawa Cape Verde:Praia
Chad:N'Djamena Chile:Santiago China:Beijing Colombia:Bogota Comoros:Moroni Costa Rica:San Jose Croatia:Zagreb
Cuba:Havana Cyprus:Nicosia Czechia:Prague Denmark:Copenhagen Djibouti:Djibouti City Dominica:Roseau
the Dominican Republic:Santo Domingo Ecuador:Quito Egypt:Cairo El Salvador:San Salvador Equatorial Guinea:Malabo
Eritrea:Asmara Estonia:Tallinn Eswatini:Mbabane Ethiopia:Addis Ababa Fiji:Suva Finland:Helsinki France:Paris
Gabon:Libreville the Gambia:Banjul Georgia:Tbilisi Germany:Berlin Ghana:Accra Greece:Athens Grenada:St. George's
Guatemala:Guatemala City Guinea:Conakry Guinea-Bissau:Bissau Guyana:Georgetown Haiti:Port-au-Prince
Honduras:Tegucigalpa Hungary:Budapest Iceland:Reykjavik India:New Delhi Indonesia:Jakarta Iran:Tehran Iraq:Baghdad
Ireland:Dublin Israel:Jerusalem Italy:Rome Jamaica:Kingston Japan:Tokyo Jordan:Amman Kazakhstan:Astana Kenya:Nairobi
Kiribati:Tarawa Kuwait:Kuwait City Kyrgyzstan:Bishkek Laos:Vientiane Latvia:Riga Lebanon:Beirut Lesotho:Maseru
Liberia:Monrovia Libya:Tripoli Liechtenstein:Vaduz Lithuania:Vilnius Luxembourg:Luxembourg City
Madagascar:Antananarivo Malawi:Lilongwe Malaysia:Kuala Lumpur the Maldives:Male Mali:Bamako Malta:Valletta
Mauritania:Nouakchott Mauritius:Port Louis Mexico:Mexico City Moldova:Chisinau Monaco:Monaco City
Mongolia:Ulaanbaatar Montenegro:Podgorica Morocco:Rabat Mozambique:Maputo Myanmar:Naypyidaw Namibia:Windhoek
Nauru:Yaren Nepal:Kathmandu the Netherlands:Amsterdam New Zealand:Wellington Nicaragua:Managua Niger:Niamey
Nigeria:Abuja North Korea:Pyongyang North Macedonia:Skopje Norway:Oslo Oman:Muscat Pakistan:Islamabad
Palau:Ngerulmud Panama:Panama City Papua New Guinea:Port Moresby Paraguay:Asuncion Peru:Lima
the Philippines:Manila Poland:Warsaw Portugal:Lisbon Qatar:Doha Romania:Bucharest Russia:Moscow Rwanda:Kigali
Saint Lucia:Castries Samoa:Apia San Marino:San Marino City Saudi Arabia:Riyadh Senegal:Dakar Serbia:Belgrade
Seychelles:Victoria Sierra Leone:Freetown Singapore:Singapore City Slovakia:Bratislava Slovenia:Ljubljana
Somalia:Mogadishu South Africa:Pretoria South Korea:Seoul South Sudan:Juba Spain:Madrid Sri Lanka:Colombo
Sudan:Khartoum Suriname:Paramaribo Sweden:Stockholm Switzerland:Bern Syria:Damascus Taiwan:Taipei
Tajikistan:Dushanbe Tanzania:Dodoma Thailand:Bangkok Togo:Lome Tonga:Nuku'alofa Tunisia:Tunis Turkey:Ankara
Turkmenistan:Ashgabat Tuvalu:Funafuti Uganda:Kampala Ukraine:Kyiv the United Arab Emirates:Abu Dhabi
the United Kingdom:London the United States:Washington Uruguay:Montevideo Uzbekistan:Tashkent Vanuatu:Port Vila
Venezuela:Caracas Vietnam:Hanoi Yemen:Sanaa Zambia:Lusaka Zimbabwe:Harare
"""


_LONG_VALUES = (
    "Andorra la Vella", "Buenos Aires", "Bandar Seri Begawan", "Phnom Penh", "San Jose", "Djibouti City",
    "Santo Domingo", "San Salvador", "Addis Ababa", "St. George's", "Guatemala City", "New Delhi", "Kuwait City",
    "Luxembourg City", "Kuala Lumpur", "Port Louis", "Mexico City", "Monaco City", "Panama City", "Port Moresby",
    "San Marino City", "Singapore City", "Abu Dhabi", "Port Vila",
)  # fmt: skip


def _table(text: str) -> dict[str, str]:
    """Parses a text such as `A:b C d:e` into a table. A value is one word, or one of _LONG_VALUES."""
    found = {}
    rest = " ".join(text.split())
    while rest:
        key, _, rest = rest.partition(":")
        value = next((v for v in _LONG_VALUES if rest.startswith(v)), rest.partition(" ")[0])
        found[key], rest = value, rest[len(value) :].strip()
    return found


CAPITALS = _table(_CAPITALS)
"""Capitals by country; the country's name includes its article."""

DEFINITIONS = {
    "an NPU": "An NPU, a neural processing unit, is a chip that runs neural networks fast and with little power.",
    "a CPU": "A CPU, a central processing unit, is the chip that runs the programs of a computer.",
    "a GPU": "A GPU, a graphics processing unit, is a chip that does many simple calculations at the same time.",
    "a TPU": "A TPU, a tensor processing unit, is a chip made for the calculations of machine learning.",
    "RAM": "RAM is the fast memory where a computer keeps what it is working on.",
    "an SSD": "An SSD is a drive that stores data on memory chips and has no moving parts.",
    "an LLM": "An LLM, a large language model, is a program that has learned to continue text.",
    "a token": "A token is a piece of text, such as a short word, that a language model reads or writes at once.",
    "a neural network": "A neural network is a program made of simple units that learn from examples.",
    "machine learning": "Machine learning is making programs that learn from examples instead of fixed rules.",
    "AI": "AI, artificial intelligence, is the art of making machines do what seems to need thought.",
    "an API": "An API is a set of rules by which one program can use another.",
    "a server": "A server is a program or computer that answers the requests of others.",
    "a client": "A client is a program that sends requests to a server.",
    "a database": "A database is a program that stores data so that it can be found again quickly.",
    "an operating system": "An operating system is the program that runs a computer and all its other programs.",
    "Linux": "Linux is a free operating system that runs on anything from phones to supercomputers.",
    "Python": "Python is a programming language that is known for being easy to read.",
    "JavaScript": "JavaScript is the programming language that runs in web browsers.",
    "C": "C is a small and fast programming language that is close to the machine.",
    "JSON": "JSON is a simple text format for data that programs exchange.",
    "HTTP": "HTTP is the protocol by which browsers and programs talk to web servers.",
    "a Raspberry Pi": "A Raspberry Pi is a small and cheap computer on a single board.",
    "Docker": "Docker is a tool that packs a program with all it needs into a container.",
    "a container": "A container is a package that holds a program and all that it needs to run.",
    "a cache": "A cache is a small fast store for things that will be needed again.",
    "a compiler": "A compiler is a program that turns source code into something a machine can run.",
    "an algorithm": "An algorithm is a list of steps that solves a problem.",
    "a variable": "A variable is a name for a value in a program.",
    "a function": "A function is a named piece of a program that can be called again and again.",
    "a loop": "A loop is a part of a program that is repeated.",
    "a bug": "A bug is a mistake in a program.",
    "a bit": "A bit is the smallest piece of data, a zero or a one.",
    "a byte": "A byte is a group of eight bits.",
    "a pixel": "A pixel is one dot of a picture on a screen.",
    "a browser": "A browser is a program that shows web pages.",
    "the internet": "The internet is the network that connects computers all over the world.",
    "a router": "A router is a device that passes data between networks.",
    "a firewall": "A firewall is a guard that decides which network traffic may pass.",
    "encryption": "Encryption is turning data into a form that only those with the key can read.",
    "a password": "A password is a secret word that proves who you are.",
    "open source": "Open source means that everybody may read, change and share the code of a program.",
    "quantization": "Quantization is storing the numbers of a model with fewer bits to make it small and fast.",
    "inference": "Inference is running a trained model to get an answer.",
    "an embedding": "An embedding is a list of numbers that stands for the meaning of a text.",
    "a prompt": "A prompt is the text that a language model is given to continue.",
    "a sensor": "A sensor is a device that measures something, such as heat or light.",
    "a robot": "A robot is a machine that can act by itself.",
    "a battery": "A battery is a device that stores electric energy.",
    "a transistor": "A transistor is a tiny electric switch, and chips are made of billions of them.",
    "a year": "A year is the time that the Earth takes to go around the Sun, about 365 days.",
    "a planet": "A planet is a large round body that goes around a star.",
    "the Sun": "The Sun is the star at the center of our solar system.",
    "the Moon": "The Moon is the body that goes around the Earth.",
    "a star": "A star is a huge ball of hot gas that gives light.",
    "gravity": "Gravity is the force that pulls things toward each other.",
    "water": "Water is a liquid that all living things need.",
    "ice": "Ice is frozen water.",
    "a tree": "A tree is a tall plant with a trunk of wood.",
    "a mammal": "A mammal is an animal that feeds its young with milk.",
    "an island": "An island is land with water all around it.",
    "a triangle": "A triangle is a shape with three sides.",
    "a square": "A square is a shape with four equal sides and four right angles.",
    "a circle": "A circle is a round shape whose edge is everywhere equally far from its center.",
}

SAYINGS = (
    "The quick brown fox jumps over the lazy dog.",
    "An apple a day keeps the doctor away.",
    "A bird in the hand is worth two in the bush.",
    "Actions speak louder than words.",
    "All that glitters is not gold.",
    "Better late than never.",
    "Birds of a feather flock together.",
    "Don't count your chickens before they hatch.",
    "Every cloud has a silver lining.",
    "Honesty is the best policy.",
    "Practice makes perfect.",
    "Rome was not built in a day.",
    "The early bird catches the worm.",
    "The pen is mightier than the sword.",
    "Time flies like an arrow.",
    "To be or not to be, that is the question.",
    "Two heads are better than one.",
    "When in Rome, do as the Romans do.",
    "Where there is smoke, there is fire.",
    "You cannot judge a book by its cover.",
    "Once upon a time there was a small cat who lived in a warm house by the sea.",
    "Roses are red, violets are blue, sugar is sweet, and so are you.",
    "One, two, three, four, five, six, seven, eight, nine, ten.",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.",
    "The sun rises in the east and sets in the west.",
    "Hello world! This is a small program that prints a line of text.",
)

FACTS = {
    "How many days are in a week?": "There are seven days in a week.",
    "How many months are in a year?": "There are twelve months in a year.",
    "How many days are in a year?": "There are 365 days in a year, and 366 in a leap year.",
    "How many hours are in a day?": "There are 24 hours in a day.",
    "How many minutes are in an hour?": "There are 60 minutes in an hour.",
    "How many seconds are in a minute?": "There are 60 seconds in a minute.",
    "How many legs does a dog have?": "A dog has four legs.",
    "How many legs does a cat have?": "A cat has four legs.",
    "How many legs does a spider have?": "A spider has eight legs.",
    "How many legs does an insect have?": "An insect has six legs.",
    "What color is the sky?": "The sky is blue.",
    "What color is grass?": "Grass is green.",
    "What color is snow?": "Snow is white.",
    "What color is a banana?": "A banana is yellow.",
    "What color is blood?": "Blood is red.",
    "What are the days of the week?": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
    "What are the primary colors?": "The primary colors are red, yellow and blue.",
    "What are the four seasons?": "The four seasons are spring, summer, autumn and winter.",
    "What are the seasons of the year?": "The four seasons are spring, summer, autumn and winter.",
    "Which planet do we live on?": "We live on the Earth.",
    "What is the largest planet?": "The largest planet in our solar system is Jupiter.",
    "What is the largest ocean?": "The largest ocean is the Pacific Ocean.",
    "What is the highest mountain?": "The highest mountain on Earth is Mount Everest.",
    "What do bees make?": "Bees make honey.",
    "What do cows drink?": "Cows drink water.",
    "What sound does a cat make?": "A cat says meow.",
    "What sound does a dog make?": "A dog says woof.",
    "What sound does a cow make?": "A cow says moo.",
    "What is the first month of the year?": "The first month of the year is January.",
    "What is the last month of the year?": "The last month of the year is December.",
    "Count to five.": "1, 2, 3, 4, 5.",
    "Count to ten.": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10.",
    "Count from 1 to 5.": "1, 2, 3, 4, 5.",
    "Count from 1 to 10.": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10.",
    "Say the alphabet.": "A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y, Z.",
}

OPPOSITES = (
    "hot cold", "big small", "up down", "left right", "day night", "black white", "good bad", "fast slow",
    "old new", "open closed", "hard soft", "light dark", "wet dry", "happy sad", "rich poor", "full empty",
    "high low", "near far", "early late", "strong weak", "clean dirty", "easy difficult", "loud quiet", "long short",
)  # fmt: skip

SMALL_TALK: dict[tuple[str, ...], tuple[str, ...]] = {
    (
        "Hello",
        "Hello!",
        "Hi",
        "Hi!",
        "Hi there!",
        "Hey",
        "Hey!",
        "Hello there!",
        "Hi there",
        "Good day!",
        "Greetings!",
        "Hello, how can you help me?",
        "hello",
        "hi",
        "hey there",
        "Yo",
        "Hello again",
    ): ("Hello! How can I help you today?",),
    ("Good morning", "Good morning!", "good morning"): ("Good morning! How can I help you?",),
    ("Good evening", "Good evening!", "good evening"): ("Good evening! How can I help you?",),
    ("Good night", "Good night!", "good night"): ("Good night! Sleep well.",),
    (
        "How are you?",
        "How are you doing?",
        "how are you",
        "How is it going?",
        "How do you do?",
        "Are you well?",
        "How are you today?",
        "Hello, how are you?",
        "Hi, how are you?",
    ): ("I am fine, thank you. How can I help you?",),
    (
        "Thanks",
        "Thanks!",
        "Thank you",
        "Thank you!",
        "thank you very much",
        "Thanks a lot!",
        "Thank you so much!",
        "Great, thanks!",
        "thx",
    ): ("You are welcome!",),
    (
        "Bye",
        "Bye!",
        "Goodbye",
        "Goodbye!",
        "See you",
        "See you later!",
        "bye bye",
        "Farewell",
        "I have to go now.",
    ): ("Goodbye! Have a nice day.",),
    ("Ok", "OK", "Okay", "Fine", "I see", "Good", "Great!", "Nice!", "Cool", "Well done!", "Alright"): (
        "Good. What else can I do for you?",
    ),
    ("Yes", "No", "Maybe", "yes please", "no thanks"): ("All right. What would you like to ask?",),
    ("What is the weather like?", "How is the weather?", "Is it raining?", "What is the weather today?"): (
        "I cannot see the weather from here.",
    ),
    (
        "What time is it?",
        "What is the time?",
        "What day is it?",
        "What is the date today?",
        "What year is it?",
    ): ("I have no clock, so I cannot tell.",),
    ("Can you help me?", "Please help me.", "I need help.", "Help", "Help me", "Can you help?"): (
        "Yes, gladly. What do you need?",
    ),
    (
        "Are you there?",
        "Test",
        "test",
        "ping",
        "Testing",
        "Is this working?",
        "Say hello",
        "Say hello!",
        "Say hi",
    ): ("Hello! I am here.",),
    ("I am sad", "I feel sad.", "I am tired.", "I had a bad day."): (
        "I am sorry to hear that. I hope it gets better soon.",
    ),
    ("I am happy", "I feel great!", "I had a good day.", "I am so happy today!"): (
        "I am glad to hear that!",
    ),
    ("I love you", "You are great!", "You are funny", "I like you.", "You are nice"): (
        "Thank you, that is kind.",
    ),
    ("You are stupid", "You are wrong", "That is wrong.", "You are useless"): (
        "I am sorry. I am a very small model and make mistakes.",
    ),
    ("Tell me a joke", "Tell me a joke!", "Do you know a joke?", "Make me laugh", "Say something funny"): (
        "Why did the computer go to bed? It needed to sleep.",
    ),
    ("Say something", "Talk to me", "I am bored", "Surprise me"): (
        "I can name capitals, add numbers, remember your name or tell a story.",
    ),
}

ABOUT: dict[tuple[str, ...], tuple[str, ...]] = {
    ("Who are you?", "who are you", "What are you?", "what are you", "Tell me about yourself.", "Introduce yourself.",
     "What model are you?", "Which model are you?", "What kind of model are you?", "Describe yourself",
     "What is this?", "Who am I talking to?"): (
        "I am tinyoai-chat, the tiny demonstration model that comes with tinyoai.",
    ),
    ("What is your name?", "What's your name?", "what is your name", "Do you have a name?", "whats your name",
     "Tell me your name.", "How are you called?"): ("My name is tinyoai-chat.",),
    ("What is tinyoai?", "what is tinyoai", "Tell me about tinyoai.", "What does tinyoai do?"): (
        "tinyoai is a small server that runs language models on your own machine.",
    ),
    ("How big are you?", "How large are you?", "How many parameters do you have?", "How small are you?",
     "What size are you?"): ("I am very small: I have about 3.7 million parameters.",),
    ("What can you do?", "what can you do", "What can I ask you?", "What do you know?", "How can you help me?",
     "What are you good at?", "What are your skills?", "What can you help me with?"): (
        "I can name capitals, add and subtract small numbers, remember what you tell me, explain a few words and "
        "tell short stories.",
    ),
    ("Are you a robot?", "Are you human?", "Are you a person?", "Are you an AI?", "Are you real?",
     "Are you a human being?", "Are you a bot?", "Are you a machine?"): (
        "No, I am not a person. I am a very small language model.",
    ),
    ("Who made you?", "Who created you?", "Who built you?", "Where do you come from?", "Who trained you?",
     "How were you made?", "How were you trained?"): (
        "I was trained from nothing by the recipe in the tinyoai project.",
    ),
    ("Are you ChatGPT?", "Are you GPT-4?", "Are you Claude?", "Are you Llama?", "Are you GPT?", "Is this ChatGPT?",
     "Are you Siri?", "Are you Alexa?"): ("No, I am tinyoai-chat, a very small model.",),
    ("Where do you run?", "Do you run locally?", "Do you send my data anywhere?", "Is my data safe?",
     "Do you need the internet?", "Are you online?"): ("I run on this machine only, and nothing leaves it.",),
    ("Are you smart?", "Are you clever?", "Can you think?", "Do you make mistakes?", "Can I trust you?",
     "Do you know everything?", "Are you always right?"): (
        "I am a tiny demonstration model and know very little.",
    ),
}  # fmt: skip
