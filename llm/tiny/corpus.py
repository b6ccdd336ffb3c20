"""The corpus of the embedded model: short stories, and facts about who has what, written by a seeded grammar.

Every transfer of a thing draws from the combinations {giver, receiver} x colour x object. One in eight of them is held
out by hash, whichever way the thing goes: `documents` never draws it, `held_out_questions` draws nothing else. A right
answer is then read from the context, not remembered. Standard library only, so the runtime can measure its own score.
"""

import hashlib
import random
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


class Document(NamedTuple):
    """`answers` are the offsets in the text where a word starts that follows from what stands before it."""

    text: str
    answers: set[int]


class Mix(NamedTuple):
    """Which documents are drawn: the share of stories; among the others, the facts, the share about two things; how
    likely another sentence comes between two facts, and how likely a thing moves on."""

    stories: float = 0.35
    two_things: float = 0.25
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


# {g}iver, {r}eceiver, {c}olour, {o}bject: the two names come in both orders.
GIFTS = [
    "{g} gave the {c} {o} to {r}.",
    "{g} gave {r} the {c} {o}.",
    "{g} handed the {c} {o} to {r}.",
    "{r} got the {c} {o} from {g}.",
    "{r} was given the {c} {o} by {g}.",
    "{r} took the {c} {o} from {g}.",
]
TRANSFERS = [
    *GIFTS,
    "{g} sold the {c} {o} to {r}.",
    "{g} passed {r} the {c} {o}.",
    "{r} bought the {c} {o} from {g}.",
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
    """Who has what. Every transfer it draws is held out, or none is."""

    def __init__(self, rng: random.Random, held_out: bool) -> None:
        self.rng = rng
        self.held_out = held_out
        self.people: list[str] = []
        self.owner: dict[Thing, str] = {}
        self.giver: dict[Thing, str] = {}

    def person(self, pool: list[str] = NAMES) -> str:
        """Someone who is not in this world yet."""
        name = self.rng.choice([n for n in pool if n not in self.people])
        self.people.append(name)
        return name

    def thing(self, giver: str) -> Thing:
        """A thing that the giver may pass on, of a kind and a colour not here yet, so that either of them names it."""
        colours = [c for c in COLOURS if all(c != t.colour for t in self.owner)]
        nouns = [n for n in OBJECTS if all(n != t.noun for t in self.owner)]
        while True:
            thing = Thing(self.rng.choice(colours), self.rng.choice(nouns))
            if self.receivers(giver, thing):
                return thing

    def may_move(self, giver: str, thing: Thing, receiver: str) -> bool:
        return giver != receiver and is_held_out(giver, thing, receiver) == self.held_out

    def receivers(self, giver: str, thing: Thing) -> list[str]:
        return [name for name in NAMES if self.may_move(giver, thing, name)]

    def receiver(self, giver: str, thing: Thing) -> str:
        """Someone to whom the giver may pass the thing: at times a person already met."""
        receivers = self.receivers(giver, thing)
        met = [name for name in receivers if name in self.people]
        if len(met) == len(receivers) or (met and self.rng.random() < 0.3):
            return self.rng.choice(met)
        return self.person(receivers)

    def move(self, giver: str, thing: Thing, receiver: str) -> None:
        self.owner[thing], self.giver[thing] = receiver, giver

    def transfer(self, thing: Thing, giver: str, receiver: str, phrases: list[str] = TRANSFERS) -> str:
        self.move(giver, thing, receiver)
        return self.rng.choice(phrases).format(g=giver, r=receiver, c=thing.colour, o=thing.noun)

    def give_back(self, thing: Thing) -> str:
        owner, receiver = self.owner[thing], self.giver[thing]
        self.move(owner, thing, receiver)
        return self.rng.choice(RETURNS).format(g=receiver, r=owner, o=thing.noun)

    def filler(self) -> str:
        rng = self.rng
        text = rng.choice(FILLERS)
        if "{n}" not in text:
            return text.format(a=rng.choice(ANIMALS), p=rng.choice(PLACES))
        name = rng.choice(self.people) if self.people and rng.random() < 0.5 else rng.choice(NAMES)
        return text.format(n=name, a=rng.choice(ANIMALS), p=rng.choice(PLACES))

    def question(self, thing: Thing, asked: list[tuple[str, str, str]] = ASKED) -> tuple[Question, str]:
        """A question about the thing, and the rest of its sentence after the answer."""
        kind, text, rest = self.rng.choice(asked)
        owner = self.owner[thing]
        answer = {"owner": owner, "giver": self.giver[thing], "colour": thing.colour, "object": thing.noun}
        return Question(text.format(c=thing.colour, o=thing.noun, h=owner), " " + answer[kind], kind), rest


# Beats: the alternatives of one are parted by "|". "A x B" moves thing x from A to B in the words of one of GIFTS,
# "x back" moves it back again.
OPENING = """Once upon a time, there was a {t} {A.girl} named {A}.|Once upon a time, there was a {A.girl} named {A}. \
{A.He} was {t}.|Once upon a time, a {t} {A.girl} named {A} lived {p}.|One day, a {t} {A.girl} named {A} went for a \
walk.|Long ago, a {t} {A.girl} named {A} lived {p}.
{w}"""
ENDING = """They ate bread and honey and told each other stories.|They sang a happy song and danced {p}.|A {animal} \
came by and looked at them. They laughed.
{e}
{A} and {B} walked home together.|{A} and {B} were tired and went home.|Then it was time to go home.
Everyone said that {A} was a very {t} {A.girl}.|At home, {A} told {A.his} mother about {B}.|That night, {A} dreamed of \
{B} and the {x.noun}.
From that day on, {A} and {B} were good friends.|They lived happily ever after.|The end."""
PLOTS = {
    "gift": """{A} had {x.a}. {A.He} liked to play with {A.his} {x.noun}.|{A} loved {A.his} {x} very much.
One morning, {A} met a {B.girl} named {B} {q}.|{A} saw a {B.girl} {q}. The name of the {B.girl} was {B}.
{B} was sad because {B.he} had no {x.noun}.|{B} was crying because {B.he} did not have a {x.noun}.
"Why are you sad?" asked {A}. "I have no {x.noun} to play with," said {B}.|"What is wrong, {B}?" asked {A}. "I want \
{x.a} too," said {B}.
"You can have my {x.noun}," said {A}.|"Do not be sad," said {A}. "I have something for you."
A x B
{B} was very happy.|{B} smiled and danced with the {x.noun}.
"Thank you, {A}!" said {B}. "You are a good friend."|"Thank you, {A}!" said {B}. "You are so {t}!\"""",
    "lost": """{A} had {x.a}. It was the best {x.noun} of all.|{A} loved {A.his} {x} very much.
But one morning, the {x.noun} was gone.|But then the wind took the {x.noun} away.
{A} looked for it {p}, but it was not there. {A} was very sad.|{A} looked for it all day and began to cry.
{B}, a {u} {B.girl}, found {x.a} {q}.|A {u} {B.girl} named {B} found {x.a} {q}.
"Is this your {x.noun}, {A}?" asked {B}.|"Look, {A}, what did I find?" said {B}.
"Yes, it is mine!" said {A}.|"Yes, that is my {x.noun}!" said {A}.
B x A
{A} was not sad any more. {A.He} hugged {B}.|{A} jumped with joy.
"Thank you, {B}!" said {A}. "Now we can play together.\"""",
    "loan": """{A} had {x.a} and played with it {p}.|{A} loved {A.his} {x} very much.
{A.His} friend {B} came to play. {B} was a {u} {B.girl}.|Then came {B}, a {u} {B.girl}.
"May I play with your {x.noun}?" asked {B}.|"I like your {x.noun}," said {B}. "May I have it for one day?"
"Yes, but please take good care of it," said {A}.|"Yes, you may, {B}," said {A}.
A x B
{B} went {q} and played with the {x.noun} all day.|{B} was happy and ran {q} with the {x.noun}.
The next day, {B} came to see {A} again.|In the evening, {B} came to see {A} again.
x back
"Thank you, {A}," said {B}. "That was fun!"|"I had a lot of fun," said {B}.""",
    "trade": """{A} had {x.a}, but {A.he} wanted a {y.noun}.|{A} had {x.a} and {A.he} was tired of it.
{A} met {B} {q}. {B} had {y.a}.|A {u} {B.girl} named {B} came by with {y.a}.
"What a nice {y.noun}!" said {A}. "Do you want my {x.noun} for it?"|"I like your {y.noun}, {B}," said {A}. "Do you \
like my {x.noun}?"
{B} thought about it. "Yes, I do," said {B}.|"Yes, let us trade," said {B}.
A x B
B y A
They were both very happy.|Both of them smiled.
{A} played with the {y.noun} and {B} played with the {x.noun}.""",
    "chain": """{A} found {x.a} {p}, but {A.he} did not need it.|{A} had {x.a}, but {A.he} was too big for it now.
So {A} went to see {B}, a {u} {B.girl}.|{A} met {B} {q}.
"Do you want this {x.noun}, {B}?" asked {A}. "Yes, please!" said {B}.
A x B
Then {B} met {C}, who was sad.|Then {B} saw that {C} was crying.
"Here is something nice for you, {C}," said {B}.|"Do not cry, {C}," said {B}.
B x C
{C} was happy and thanked {B}. {A} was happy too.|{C} smiled at {B} and {A}.""",
    "birthday": """It was the birthday of {A}, and {A.he} asked {A.his} friends to a party {q}.
First came {B}, a {u} {B.girl}. "Happy birthday, {A}!" said {B}.|First came {B}. "This is for you, {A}," said {B}.
B x A
Then came {C}. "Happy birthday!" said {C}. "I have something for you too."|Then came {C} with a big smile.
C y A
"What a nice {y.noun}!" said {A}. "And I love the {x.noun}!"|{A} was so happy that {A.he} hugged {B} and {C}.
They ate cake, sang songs and played games all day.""",
}


def story(world: World) -> tuple[list[str], list[str], list[Thing]]:
    """The sentences up to the last transfer's aftermath, those of the ending, and the things that changed hands."""
    rng = world.rng
    plot = PLOTS[rng.choice(list(PLOTS))].split("\n")
    moves = [beat.split() for beat in plot if len(beat) == 5]
    while True:
        names = dict(zip("ABC", rng.sample(NAMES, 3), strict=True))
        colours, nouns = rng.sample(COLOURS, 2), rng.sample(OBJECTS, 2)
        things = {"x": Thing(colours[0], nouns[0]), "y": Thing(colours[1], nouns[1])}
        if all(world.may_move(names[g], things[t], names[r]) for g, t, r in moves):
            break
    world.people += names.values()
    t, u = rng.sample(TRAITS, 2)
    p, q = rng.sample(PLACES, 2)
    w, e = rng.choice(WEATHER)
    animal = rng.choice(ANIMALS)
    cast = {role: Person(name) for role, name in names.items()}

    def tell(beat: str) -> str:
        match beat.split():
            case [giver, thing, receiver] if len(beat) == 5:
                return world.transfer(things[thing], names[giver], names[receiver], GIFTS)
            case [thing, "back"]:
                return world.give_back(things[thing])
        return rng.choice(beat.split("|")).format(**cast, **things, p=p, q=q, t=t, u=u, w=w, e=e, animal=animal)

    body = [tell(beat) for beat in (*OPENING.split("\n"), *plot)]
    return body, [tell(beat) for beat in ENDING.split("\n")], list(world.owner)


def facts(world: World, mix: Mix) -> tuple[list[str], list[Thing]]:
    """Plain sentences about things that change hands, and those things."""
    rng = world.rng
    told = []
    for _ in range(1 + (rng.random() < mix.two_things)):
        giver = rng.choice(world.people) if world.people and rng.random() < 0.3 else world.person()
        thing = world.thing(giver)
        told.append(world.transfer(thing, giver, world.receiver(giver, thing)))
        while rng.random() < mix.noise:
            told.append(world.filler())
        while rng.random() < mix.noise:
            owner = world.owner[thing]
            if rng.random() < 0.5 or not world.receivers(owner, thing):
                told.append(world.give_back(thing))
            else:
                told.append(world.transfer(thing, owner, world.receiver(owner, thing)))
            if rng.random() < mix.noise:
                told.append(world.filler())
    return told, list(world.owner)


def document(rng: random.Random, mix: Mix) -> Document:
    """A story, or facts and what follows from them."""
    world = World(rng, held_out=False)
    if rng.random() < mix.stories:
        told, ending, things = story(world)
        asked, count = STATED, 2
    else:
        told, things = facts(world, mix)
        ending, asked, count = [], ASKED, rng.randint(2, 5)
    text, answers = " ".join(told), set()
    for _ in range(count):
        question, rest = world.question(rng.choice(things), asked)
        if question.prompt in text:  # what is said twice teaches the model to go round in circles
            continue
        text += f" {question.prompt}"
        answers.add(len(text))
        text += question.answer + rest
    return Document(" ".join((text, *ending)), answers)


def documents(seed: int, mix: Mix = FULL) -> Iterator[Document]:
    """The corpus: without end, the same for the same arguments."""
    rng = random.Random(seed)
    while True:
        yield document(rng, mix)


def held_out_questions(count: int, seed: int, *, two_things: bool = False) -> list[Question]:
    """Questions whose every transfer is a combination that no document holds: half after facts, half within a story.

    The facts are about one thing, which may change hands repeatedly with other sentences in between, or about two.
    """
    rng = random.Random(seed)
    mix = FULL._replace(two_things=float(two_things))
    questions = []
    for index in range(count):
        world = World(rng, held_out=True)
        context = "story" if index % 2 else "facts"
        if context == "story":
            told, _, things = story(world)
        else:
            told, things = facts(world, mix)
        question, _ = world.question(rng.choice(things), STATED if context == "story" else ASKED)
        questions.append(question._replace(prompt=" ".join((*told, question.prompt)), context=context))
    return questions
