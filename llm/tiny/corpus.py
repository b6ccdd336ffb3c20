"""The corpus of the embedded model: short stories, and facts about who has what, written by a seeded grammar.

Every transfer of a thing draws from the combinations {giver, receiver} x colour x object. One in eight of them is held
out by hash, whichever way the thing goes: `documents` never draws it, `held_out_questions` draws nothing else. A right
answer is then read from the context, not remembered. Standard library only, so the runtime can measure its own score.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from typing import NamedTuple


def words(text: str) -> list[str]:
    return text.split()


GIRLS = words("""Mia Anna Lily Emma Zoe Ruby Nora Clara Rosa Ella Lucy Alice Eva Ivy Grace Maya Sara Lena Julia Kate
Jane Molly Daisy Hanna""")
BOYS = words("""Tom Ben Max Leo Sam Jack Finn Oscar Hugo Paul Peter Noah Adam Luke Felix Theo Oliver David Daniel Henry
George Simon Robert Martin""")
NAMES = GIRLS + BOYS
COLOURS = words("red blue green yellow white black brown pink purple orange")
OBJECTS = words("""ball cup hat kite book drum bell boat doll lamp box coat scarf key ring coin flute basket spoon bowl
bag map pen clock mirror ribbon blanket pillow candle button shell stone feather rope wagon bucket brush whistle puzzle
lantern""")
PLACES = [
    "in the park",
    "in the forest",
    "in the garden",
    "at the beach",
    "at the market",
    "at school",
    "on the farm",
    "by the river",
    "on the hill",
    "by the lake",
    "in the village",
    "near the old bridge",
    "under the big tree",
]
TRAITS = words("kind brave little quiet clever cheerful shy gentle curious funny")
ANIMALS = words("dog cat bird rabbit duck horse frog mouse")
CONTENT = re.compile(rf"\b(?:{'|'.join(NAMES + COLOURS + OBJECTS)})\b")

# How a day begins, and how the same weather reads when it ends.
WEATHER = [
    ("The sun was shining.", "The sun went down and the sky was pink."),
    ("It was raining.", "The rain stopped and the clouds went away."),
    ("The wind was strong.", "The wind grew soft and the trees were still."),
    ("Snow was falling.", "The snow stopped and the hills were white."),
    ("The sky was grey.", "The grey clouds went away and the stars came out."),
    ("It was a warm day.", "The warm day was over and the moon came out."),
]


class Thing(NamedTuple):
    """`{x}` in a template reads "red ball", `{x.a}` reads "a red ball"."""

    colour: str
    noun: str

    def __str__(self) -> str:
        return f"{self.colour} {self.noun}"

    @property
    def a(self) -> str:
        return f"{'an' if self.colour == 'orange' else 'a'} {self}"


class Person:
    """`{A}` in a template reads the name, `{A.he}`, `{A.He}`, `{A.his}` and `{A.girl}` the words that go with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.he, self.his, self.girl = ("she", "her", "girl") if name in GIRLS else ("he", "his", "boy")
        self.He, self.His = self.he.capitalize(), self.his.capitalize()

    def __str__(self) -> str:
        return self.name


class Mix(NamedTuple):
    """Which documents are drawn: the share of stories, the others are facts; how likely another sentence comes between
    two facts, and how likely the thing moves on."""

    stories: float = 0.4
    noise: float = 0.35


FULL = Mix()


class Question(NamedTuple):
    """`prompt` ends just before the answer, which starts with the space; `kind` is what is asked for."""

    prompt: str
    answer: str
    kind: str
    context: str = "facts"


def is_held_out(one: str, thing: Thing, other: str) -> bool:
    """Whether no document moves this thing between these two people, in either direction."""
    key = "|".join((*sorted((one, other)), *thing))
    return hashlib.sha256(key.encode()).digest()[0] % 8 == 0


# {g}iver, {r}eceiver, {c}olour, {o}bject. Facts put the two names in either order, stories the giver first: there the
# plot says who gives.
GIFTS = [
    "{g} gave the {c} {o} to {r}.",
    "{g} gave {r} the {c} {o}.",
    "{g} handed the {c} {o} to {r}.",
]
TRANSFERS = [
    *GIFTS,
    "{g} sold the {c} {o} to {r}.",
    "{g} passed {r} the {c} {o}.",
    "{r} got the {c} {o} from {g}.",
    "{r} took the {c} {o} from {g}.",
    "{r} bought the {c} {o} from {g}.",
    "{r} was given the {c} {o} by {g}.",
    "From {g}, {r} got the {c} {o}.",
]
# The way back: {r} has the thing and {g} gets it again.
RETURNS = [
    "{g} took the {o} back.",
    "{r} gave the {o} back.",
    "{r} gave the {o} back to {g}.",
    "{g} got the {o} back from {r}.",
]
# What a question asks for, its text before the answer, and what follows the answer.
ASKED = [
    ("owner", "The {o} now belongs to", "."),
    ("owner", "The {c} {o} now belongs to", "."),
    ("owner", "The {o} belongs to", "."),
    ("owner", "Now the {o} belongs to", "."),
    ("owner", "The owner of the {o} is", "."),
    ("owner", "The person who has the {o} now is", "."),
    ("owner", "Who has the {o} now?", " does."),
    ("owner", "Who has the {c} {o}?", " does."),
    ("giver", "The {o} was given away by", "."),
    ("giver", "Before that, the {o} belonged to", "."),
    ("colour", "The colour of the {o} is", "."),
    ("colour", "The {o} that {h} has is", "."),
    ("object", "Now {h} has the {c}", "."),
    ("object", "{h} is happy with the {c}", "."),
    ("object", "{h} put away the {c}", "."),
]
STATED = [asked for asked in ASKED if asked[0] != "giver" and "?" not in asked[1]]  # what a story may say in passing
FILLERS = [
    "{n} went for a walk {p}.",
    "{n} was {p}.",
    "{n} saw a {a} {p}.",
    "{n} sang a song.",
    "{n} was playing with the {a}.",
    "A {a} was sleeping {p}.",
    "Then it was time to eat.",
    "The day was long.",
    "{n} said hello.",
    "{n} liked the {a}.",
]


class World:
    """Some people, and who has the thing they pass on. Every transfer it draws is held out, or none is."""

    thing: Thing
    owner: str
    giver: str

    def __init__(self, rng: random.Random, held_out: bool) -> None:
        self.rng = rng
        self.held_out = held_out
        self.people: list[str] = []

    def may_move(self, giver: str, thing: Thing, receiver: str) -> bool:
        return giver != receiver and is_held_out(giver, thing, receiver) == self.held_out

    def receivers(self, giver: str) -> list[str]:
        return [name for name in NAMES if self.may_move(giver, self.thing, name)]

    def transfer(self, giver: str, receiver: str, phrases: list[str]) -> str:
        self.giver, self.owner = giver, receiver
        return self.rng.choice(phrases).format(g=giver, r=receiver, c=self.thing.colour, o=self.thing.noun)

    def pass_on(self) -> str:
        """The owner passes the thing on, at times to a person already met."""
        receivers = self.receivers(self.owner)
        met = [name for name in receivers if name in self.people]
        new = [name for name in receivers if name not in self.people]
        receiver = self.rng.choice(met if not new or (met and self.rng.random() < 0.3) else new)
        self.people.append(receiver)
        return self.transfer(self.owner, receiver, TRANSFERS)

    def give_back(self) -> str:
        self.giver, self.owner = self.owner, self.giver
        return self.rng.choice(RETURNS).format(g=self.owner, r=self.giver, o=self.thing.noun)

    def filler(self) -> str:
        rng = self.rng
        text = rng.choice(FILLERS)
        if "{n}" not in text:
            return text.format(a=rng.choice(ANIMALS), p=rng.choice(PLACES))
        name = rng.choice(self.people if rng.random() < 0.5 else NAMES)
        return text.format(n=name, a=rng.choice(ANIMALS), p=rng.choice(PLACES))

    def question(self, asked: list[tuple[str, str, str]]) -> tuple[Question, str]:
        """A question about the thing, and the rest of its sentence after the answer."""
        kind, text, rest = self.rng.choice(asked)
        colour, noun = self.thing
        answer = {"owner": self.owner, "giver": self.giver, "colour": colour, "object": noun}
        return Question(text.format(c=colour, o=noun, h=self.owner), " " + answer[kind], kind), rest


# Beats: the alternatives of one are parted by "|". "A > B" moves the thing x from A to B in the words of one of
# GIFTS, "back" moves it back again.
OPENING = """Once upon a time, there was a {t} {A.girl} named {A}.|Once upon a time, there was a {A.girl} named {A}. \
{A.He} was {t}.|Once upon a time, a {t} {A.girl} named {A} lived {p}.|One day, a {t} {A.girl} named {A} went for a \
walk.|Long ago, a {t} {A.girl} named {A} lived {p}.
{w}"""
ENDING = """They ate bread and honey and told each other stories.|They sang a happy song and danced {p}.|A {animal} \
came by and looked at them. They laughed.
{e}
{A} and {B} walked home together.|{A} and {B} were tired and went home.|Then it was time to go home.
Everyone said that {A} was a very good {A.girl}.|At home, {A} told {A.his} mother about {B}.|That night, {A} dreamed \
of {B} and the {x.noun}.
From that day on, {A} and {B} were good friends.|They lived happily ever after.|The end."""
PLOTS = {
    "gift": """{A} had {x.a}. {A.He} liked to play with {A.his} {x.noun}.|{A} loved {A.his} {x} very much.
One morning, {A} met a {B.girl} named {B} {q}.|{A} saw a {B.girl} {q}. The name of the {B.girl} was {B}.
{B} was sad because {B.he} had no {x.noun}.|{B} was crying because {B.he} did not have a {x.noun}.
"Why are you sad?" asked {A}. "I have no {x.noun} to play with," said {B}.|"What is wrong, {B}?" asked {A}. "I want \
{x.a} too," said {B}.
"You can have my {x.noun}," said {A}.|"Do not be sad," said {A}. "I have something for you."
A > B
{B} was very happy.|{B} smiled and danced with the {x.noun}.
"Thank you, {A}!" said {B}. "You are a good friend."|"Thank you, {A}!" said {B}. "You are so good to me!\"""",
    "lost": """{A} had {x.a}. It was the best {x.noun} of all.|{A} loved {A.his} {x} very much.
But one morning, the {x.noun} was gone.|But then the wind took the {x.noun} away.
{A} looked for it {p}, but it was not there. {A} was very sad.|{A} looked for it all day and began to cry.
{B}, a {u} {B.girl}, found {x.a} {q}.|A {u} {B.girl} named {B} found {x.a} {q}.
"Is this your {x.noun}, {A}?" asked {B}.|"Look, {A}, what did I find?" said {B}.
"Yes, it is mine!" said {A}.|"Yes, that is my {x.noun}!" said {A}.
B > A
{A} was not sad any more. {A.He} hugged {B}.|{A} jumped with joy.
"Thank you, {B}!" said {A}. "Now we can play together.\"""",
    "loan": """{A} had {x.a} and played with it {p}.|{A} loved {A.his} {x} very much.
{A.His} friend {B} came to play. {B} was a {u} {B.girl}.|Then came {B}, a {u} {B.girl}.
"May I play with your {x.noun}?" asked {B}.|"I like your {x.noun}," said {B}. "May I have it for one day?"
"Yes, but please take good care of it," said {A}.|"Yes, you may, {B}," said {A}.
A > B
{B} went {q} and played with the {x.noun} all day.|{B} was happy and ran {q} with the {x.noun}.
The next day, {B} came to see {A} again.|In the evening, {B} came to see {A} again.
back
"Thank you, {A}," said {B}. "That was fun!"|"I had a lot of fun," said {B}.""",
    "chain": """{A} found {x.a} {p}, but {A.he} did not need it.|{A} had {x.a}, but {A.he} was too big for it now.
So {A} went to see {B}, a {u} {B.girl}.|{A} met {B} {q}.
"Do you want this {x.noun}, {B}?" asked {A}. "Yes, please!" said {B}.
A > B
Then {B} met {C}, who was sad.|Then {B} saw that {C} was crying.
"Here is something nice for you, {C}," said {B}.|"Do not cry, {C}," said {B}.
B > C
{C} was happy and thanked {B}. {A} was happy too.|{C} smiled at {B} and {A}.""",
    "birthday": """It was the birthday of {A}, and {A.he} asked {A.his} friends to a party {q}.
First came {B}, a {u} {B.girl}. "Happy birthday, {A}!" said {B}.|First came {B}. "This is for you, {A}," said {B}.
B > A
Then came {C} with a big cake.|Then came {C}. "Happy birthday!" said {C}. "I made a cake for you."
"What a nice {x.noun}!" said {A}. "And I love cake!"|{A} was so happy that {A.he} hugged {B} and {C}.
They ate cake, sang songs and played games all day.""",
}


def story(world: World) -> tuple[list[str], list[str]]:
    """The sentences up to the last transfer's aftermath, and those of the ending."""
    rng = world.rng
    plot = PLOTS[rng.choice(list(PLOTS))].split("\n")
    moves = [(beat[0], beat[-1]) for beat in plot if beat[1:-1] == " > "]
    while True:
        names = dict(zip("ABC", rng.sample(NAMES, 3), strict=True))
        world.thing = Thing(rng.choice(COLOURS), rng.choice(OBJECTS))
        if all(world.may_move(names[giver], world.thing, names[receiver]) for giver, receiver in moves):
            break
    fields: dict[str, object] = {role: Person(name) for role, name in names.items()}
    fields |= {"x": world.thing, "animal": rng.choice(ANIMALS)}
    fields |= zip("tu", rng.sample(TRAITS, 2), strict=True)
    fields |= zip("pq", rng.sample(PLACES, 2), strict=True)
    fields |= zip("we", rng.choice(WEATHER), strict=True)

    def tell(beat: str) -> str:
        if beat == "back":
            return world.give_back()
        if beat[1:-1] == " > ":
            return world.transfer(names[beat[0]], names[beat[-1]], GIFTS)
        return rng.choice(beat.split("|")).format(**fields)

    return [tell(beat) for beat in (*OPENING.split("\n"), *plot)], [tell(beat) for beat in ENDING.split("\n")]


def facts(world: World, mix: Mix) -> list[str]:
    """Plain sentences about a thing that changes hands."""
    rng = world.rng
    world.owner = rng.choice(NAMES)
    world.people.append(world.owner)
    while True:
        world.thing = Thing(rng.choice(COLOURS), rng.choice(OBJECTS))
        if world.receivers(world.owner):
            break
    told = [world.pass_on()]
    while rng.random() < mix.noise:
        told.append(world.filler())
    while rng.random() < mix.noise:
        told.append(world.pass_on() if world.receivers(world.owner) and rng.random() < 0.5 else world.give_back())
        if rng.random() < mix.noise:
            told.append(world.filler())
    return told


def document(rng: random.Random, mix: Mix) -> str:
    """A story, or facts and what follows from them."""
    world = World(rng, held_out=False)
    if rng.random() < mix.stories:
        told, ending = story(world)
        asked, count = STATED, 1
    else:
        told, ending = facts(world, mix), []
        asked, count = ASKED, rng.randint(2, 5)
    for _ in range(count):
        question, rest = world.question(asked)
        sentence = question.prompt + question.answer + rest
        if sentence not in told:  # what is said twice teaches the model to go round in circles
            told.append(sentence)
    return " ".join((*told, *ending))


def documents(seed: int, mix: Mix = FULL) -> Iterator[str]:
    """The corpus: without end, the same for the same arguments."""
    rng = random.Random(seed)
    while True:
        yield document(rng, mix)


def recalled(text: str) -> set[int]:
    """The offsets of the spaces before those names, colours and objects that the text has said before."""
    found, said = set(), set()
    for match in CONTENT.finditer(text):
        if match[0] in said:
            found.add(match.start() - 1)
        said.add(match[0])
    return found


def held_out_questions(count: int, seed: int) -> list[Question]:
    """Questions whose every transfer is a combination that no document holds: half after facts, half within a story."""
    rng = random.Random(seed)
    questions = []
    for index in range(count):
        world = World(rng, held_out=True)
        context = "story" if index % 2 else "facts"
        told = story(world)[0] if context == "story" else facts(world, FULL)
        question, _ = world.question(STATED if context == "story" else ASKED)
        questions.append(question._replace(prompt=" ".join((*told, question.prompt)), context=context))
    return questions
