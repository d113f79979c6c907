# SPDX-License-Identifier: Apache-2.0
"""Train the demo checkpoint: a tiny Llama on text written by the grammar in this file.

Every word the model ever sees comes from the tables and templates below, so the checkpoint may be shipped with the
package. Four documents in ten are plain text (stories, introductions, facts), the others are conversations in the chat
format, which hold about half of the tokens. The corpus is generated once, long enough that no batch repeats.

    python scripts/train_demo_model.py --out tpu_inference/demo/model

The run is deterministic for a seed and a thread count; one CPU core needs about half an hour.
"""

import argparse
import json
import random
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, END, PAD, SYSTEM, USER, ASSISTANT = SPECIAL = (
    "<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{- '<|bos|>' -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}")
SEQUENCE, LONG_SEQUENCE, BATCH_TOKENS, VOCABULARY = 256, 1024, 2048, 1536

# --------------------------------------------------------------------------------------------------------------------
# Facts.


def split(text, mark=None):
    return text.strip().split(mark)



# kind | plural | home | food | sound | baby | a thing it does well | active by day or night
ANIMALS = [split(line, "|") for line in split("""
fox|foxes|a den in the woods|berries and eggs|barks|cub|walk without a sound|night
owl|owls|a hole in an old tree|mice|hoots|owlet|see in the dark|night
bear|bears|a cave in the hills|honey and fish|growls|cub|climb and swim|day
rabbit|rabbits|a burrow under the grass|clover and carrots|squeaks|kit|hop very fast|day
mouse|mice|a small hole in the wall|seeds and cheese|squeaks|pup|fit into tiny places|night
cat|cats|a warm house|fish|meows|kitten|land on its feet|night
dog|dogs|a kennel in the yard|meat and bones|barks|puppy|follow a smell|day
duck|ducks|a nest by the pond|water plants|quacks|duckling|swim and fly|day
frog|frogs|a pond with lilies|flies|croaks|tadpole|jump very far|night
hedgehog|hedgehogs|a nest of leaves|worms and beetles|snuffles|hoglet|roll into a ball|night
squirrel|squirrels|a nest in a tall oak|nuts|chatters|kitten|leap from tree to tree|day
horse|horses|a stable on the farm|hay and apples|neighs|foal|gallop for hours|day
cow|cows|a barn on the farm|grass|moos|calf|give milk|day
sheep|sheep|a green meadow|grass|bleats|lamb|grow soft wool|day
pig|pigs|a sty on the farm|corn and turnips|oinks|piglet|find things with its nose|day
goat|goats|a rocky hill|leaves and grass|bleats|kid|climb steep rocks|day
lion|lions|a wide dry plain|meat|roars|cub|run and hunt|night
elephant|elephants|a warm green plain|leaves and fruit|trumpets|calf|lift things with its trunk|day
wolf|wolves|a den in the forest|meat|howls|pup|work in a pack|night
penguin|penguins|a cold icy coast|fish|honks|chick|dive and swim|day
hen|hens|a coop on the farm|corn|clucks|chick|lay eggs|day
bee|bees|a hive in the garden|nectar|buzzes|larva|make honey|day
turtle|turtles|a sandy shore|sea grass|hisses|hatchling|swim a long way|day
deer|deer|a quiet forest|leaves and bark|grunts|fawn|run through the trees|day
""", "\n")]

NAMES = {
    "he": split("Pip Tom Max Oliver Finn Leo Sam Ben Otto Hugo Jack Theo Milo Bruno Felix Oscar"),
    "she": split("Mia Lily Ruby Nora Anna Ella Rosie Clara Daisy Luna Ivy Zoe Lucy Emma Tilly Hazel"),
}
OPPOSITES = [split(pair, "-") for pair in split(
    "hot-cold big-small up-down day-night fast-slow happy-sad old-new wet-dry open-closed light-dark hard-soft "
    "high-low full-empty early-late loud-quiet left-right in-out good-bad near-far clean-dirty strong-weak "
    "rich-poor long-short thick-thin black-white first-last start-finish sweet-sour heavy-light true-false "
    "young-old push-pull love-hate summer-winter wide-narrow deep-shallow brave-afraid yes-no")]
COLOURS = [split(pair, "-") for pair in split(
    "sky-blue grass-green snow-white sun-yellow night-black blood-red carrot-orange banana-yellow cherry-red "
    "coal-black leaf-green sea-blue milk-white lemon-yellow plum-purple chocolate-brown strawberry-red "
    "elephant-grey fox-red frog-green pig-pink")]
CAPITALS = [split(pair, "-") for pair in split(
    "France-Paris Italy-Rome Spain-Madrid Germany-Berlin England-London Japan-Tokyo China-Beijing Egypt-Cairo "
    "Greece-Athens Portugal-Lisbon Poland-Warsaw Sweden-Stockholm Norway-Oslo Finland-Helsinki Austria-Vienna "
    "Ireland-Dublin Canada-Ottawa Russia-Moscow Kenya-Nairobi Cuba-Havana Peru-Lima Denmark-Copenhagen")]
LEGS = {"spider": 8, "bee": 6, "ant": 6, "snake": 0, "fish": 0, "hen": 2, "duck": 2, "owl": 2, "penguin": 2,
        "dog": 4, "cat": 4, "horse": 4, "fox": 4, "cow": 4, "frog": 4, "table": 4, "person": 2}
DAYS = split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = split("January February March April May June July August September October November December")
NUMBERS = split("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
           "seventeen eighteen nineteen twenty")
GROUPS = {
    "animals": [a[0] for a in ANIMALS], "colours": split("red blue green yellow purple orange pink brown"),
    "fruits": split("apple pear plum cherry lemon banana peach grape"), "days": DAYS, "months": MONTHS,
    "seasons": split("spring summer autumn winter"), "vegetables": split("carrot potato onion leek turnip pea"),
    "tools": split("hammer saw spade rake needle brush"), "toys": split("ball kite doll drum puzzle train")}
SEASONS = {
    "spring": "In spring the days grow longer, flowers open, and the birds build their nests",
    "summer": "In summer the sun is high, the days are warm, and children swim in the lake",
    "autumn": "In autumn the leaves turn red and gold, and the wind blows them from the trees",
    "winter": "In winter the days are short and cold, and snow may cover the fields"}
WEATHER = {
    "rainy": "take an umbrella and wear your boots", "sunny": "wear a hat and drink plenty of water",
    "snowy": "put on a warm coat and gloves", "windy": "hold on to your hat and fly a kite",
    "foggy": "walk slowly and carry a lamp", "stormy": "stay inside and read a good book",
    "cold": "wear a thick scarf and drink hot tea", "hot": "rest in the shade and eat some ice"}
RECIPES = {
    "pancakes": ("flour, eggs, and milk", "stir them until smooth", "fry them in a hot pan", "honey"),
    "vegetable soup": ("carrots, potatoes, and an onion", "cut them into small pieces", "boil them in a pot of water",
                       "fresh bread"),
    "a fruit salad": ("apples, plums, and a banana", "wash and cut them", "mix them in a bowl", "a little lemon"),
    "bread": ("flour, water, salt, and yeast", "knead the dough and let it rise", "bake it in a hot oven", "butter"),
    "tea": ("a cup, some tea leaves, and water", "boil the water", "pour it over the leaves and wait", "milk"),
    "an omelette": ("two eggs, some butter, and salt", "beat the eggs in a bowl", "cook them gently in a pan", "toast")}

# --------------------------------------------------------------------------------------------------------------------
# Templates: one sentence a line, alternatives between bars, slots in braces.

PLACES = ["near a quiet lake", "at the edge of the forest", "on top of a green hill", "beside a winding river",
          "under an old oak tree", "in a small village by the sea", "behind a red barn", "in a snowy valley",
          "next to a field of sunflowers", "in the middle of a big garden", "close to an old stone bridge"]
THINGS = ["red scarf", "blue hat", "golden key", "little drum", "wooden boat", "silver bell", "green umbrella",
          "yellow kite", "shiny button", "warm blanket", "old map", "small lantern"]
SPOTS = ["under a pile of leaves", "behind the garden gate", "on a branch of the apple tree", "inside an old basket",
         "beside the well", "between two big stones", "at the bottom of the stairs"]
DISHES = ["apple pie", "carrot cake", "honey bread", "berry jam", "pumpkin soup", "nut bread"]
TRAITS = ["kind", "curious", "brave", "shy", "clever", "cheerful", "gentle", "lazy", "busy", "young"]
TIMES = ["morning", "afternoon", "evening", "day"]
OPENINGS = """Once upon a time, {a_trait} {kind} named {name} lived {place}.|Once upon a time, there was {a_trait} \
{kind} named {name} who lived {place}.|There was once {a_trait} {kind} called {name}. {He} lived {place}.|\
Long ago, {a_trait} {kind} named {name} lived {place}."""
STORIES = [text.strip() for text in split("""
One {time}, {name} could not find {his} {thing}.|One {time}, {name} woke up and saw that {his} {thing} was gone.
{He} looked under the bed and behind the door, but it was not there.|{He} looked everywhere, but it was not there.
Then {friend} the {fkind} came by and asked, "Why are you so sad?"
"I have lost my {thing}," said {name}.
"Do not worry," said {friend}. "We will look for it together."|"I will help you find it," said {friend}.
They followed a trail of footprints and found the {thing} {spot}.|After a long walk, they saw the {thing} {spot}.
{name} was so happy that {he} danced around {friend}.|{name} smiled and thanked {his} friend again and again.
From that day on, {name} took good care of the {thing}.|That night, {name} slept with the {thing} by {his} side.
===
One {time}, dark clouds covered the sky and a storm began.|One {time}, a great storm came over the hills.
The wind howled, and the rain fell harder and harder.|Thunder rolled, and {name} ran home as fast as {he} could.
{name} heard a knock and opened the door.|Then {name} heard a soft cry outside and opened the door.
It was {friend} the {fkind}, who was cold and wet.|There stood {friend} the {fkind}, wet from head to toe.
"Please come in," said {name}. "You can stay here tonight."
{name} made a fire and gave {friend} a bowl of soup.|{name} gave {friend} a blanket and a cup of hot tea.
They told each other stories until the storm was over.|They sang songs until the rain stopped.
In the morning, the sun came out, and the two were best friends.|The next day, they saw a rainbow together.
===
One {time}, {name} wanted to make {dish} for {his} friend {friend} the {fkind}.
{He} put everything into a big bowl and began to stir.|{He} tied on an apron, took a big bowl, and began to stir.
But there was no honey left in the jar.|But then {he} saw that the honey jar was empty.
So {name} went to the bees and asked, "May I have a little honey?"
"Yes," said the bees, "if you water our flowers first."
{name} worked hard in the sun, and the bees filled {his} jar.|{name} watered every flower and got a full jar.
Soon the {dish} was ready, and the whole house smelled sweet.|At last the {dish} was done, warm and sweet.
{friend} took one bite and said, "This is the best {dish} in the world!"
===
One {time}, {friend} the {fkind} said, "I am faster than you, {name}."
"Let us have a race to the old mill," said {name}.|"Then we will race to the big tree," said {name}.
All the animals came to watch them run.|The birds counted to three, and the race began.
{friend} ran ahead, but {fhe} tripped over a root and hurt {fhis} foot.
{name} could have won, but {he} stopped and turned back.|{name} saw this and stopped at once.
"Lean on me," {he} said, and they walked on side by side.
They reached the end at the same time, and everyone cheered.|They came in last, but everyone clapped for them.
"Winning is nice," said {friend}, "but a good friend is better."
===
One {time}, {name} found a tiny seed on the path.|One {time}, the wind dropped a tiny seed at {name}'s door.
{He} planted it in the ground and gave it water every day.|{He} put it in a pot and placed it in the sun.
For many days nothing happened, and {name} grew sad.|A week went by, but nothing came out of the earth.
"You must be patient," said {friend} the {fkind}. "Good things need time."
So {name} waited and sang to the seed every evening.|So {name} waited, and {he} did not give up.
At last, a small green leaf came up.|One day, a little green stem pushed through the soil.
By summer, it was a tall {colour} flower, and all the bees came to visit.
{name} gave the first new seed to {friend}, so that {fhe} could grow one too.
===
{name} had always dreamed of seeing the island across the water.|{name} often wondered what was across the water.
One {time}, {he} built a small boat out of wood.|One {time}, {he} found an old {colour} boat on the shore.
{friend} the {fkind} brought a basket of bread and apples, and they set off.
The waves were high, but {name} held the oars and was not afraid.|The wind pushed them far from the shore.
At noon they reached the island and found {a_thing} in the sand.
"Who could have left it here?" asked {friend}.|"What a fine thing!" said {friend}.
An old turtle came out of the sea and said, "It is yours, because you were brave."
They sailed home under the stars and told everyone about their trip.
===
{name} had one secret: {he} was afraid of the dark.|Every night, {name} was afraid of the dark.
One {time}, {he} told this to {friend} the {fkind}.
"Come with me," said {friend}. "I will show you something."|{friend} opened the door and led {name} outside.
They climbed the hill and looked up at the sky.|They walked to the lake and lay down in the grass.
Thousands of stars were shining above them.|The moon was round and bright, and the stars shone.
"Without the dark, we could not see the stars," said {friend}.
{name} looked at them for a long time and began to smile.|{name} counted them until {he} felt sleepy.
After that, {name} was not afraid of the night anymore.
===
One {time}, {friend} the {fkind} moved into the empty house next door.
{name} wanted to say hello, but {he} was too shy.|{name} watched from the window, but {he} did not dare to speak.
So {he} left {a_thing} on the doorstep with a short letter.
"Welcome! I live next door," said the letter.|The letter said, "I hope you like it here."
{friend} read it and laughed with joy.|{friend} was very glad, because {fhe} knew nobody there.
{fHe} baked {dish} and knocked on {name}'s door.
They talked and ate until the moon came up.|They shared the {dish} and talked all evening.
Now they have supper together every {day}.
===
One {time}, {name} heard that there would be a big concert on {day}.
{He} wanted to play, but {he} had no drum and no flute.|{He} loved music, but {he} could not play anything.
"What can I do?" {he} asked {friend} the {fkind}.
"You have a good voice," said {friend}. "Why do you not sing?"
So {name} practised every {time2} by the river.|So they practised together every {time2}.
On {day}, {he} stood in front of everyone and took a deep breath.
{His} song was so lovely that even the wind stood still.|{He} sang about the sea, and everyone listened.
{friend} clapped the loudest of all.|"I knew you could do it," said {friend}.
===
Winter came early, and snow covered the land.|One winter {time}, the snow was deep and the lake was frozen.
{name} had a full pantry, but {friend} the {fkind} had nothing to eat.
{friend} was too proud to ask for help.|{friend} sat at home and did not say a word.
{name} saw that there was no smoke over {fhis} house.
So {he} pulled a sled with bread and nuts through the snow.|So {he} packed a basket with {dish} and went out.
"I have made too much," said {name}. "Will you help me eat it?"
{friend} smiled, and they sat by the fire until spring seemed near.
When the snow melted, {friend} gave {name} {a_thing} to say thank you.
""", "===")]

ABOUT = """
{The_plural} live in {home}.|You can find {a_kind} in {home}.
They eat {food}.|They like to eat {food}.
{A_kind} {sound}, and its baby is called {a_baby}.|A baby {kind} is called {a_baby}.
{The_plural} are awake mostly by {active}.|They are busy by {active} and rest by {rest}.
{A_kind} can {skill}.|They can {skill}.
""".strip()
POEMS = {
    "the sea": "The sea is wide, the sea is deep,/It sings the little boats to sleep./The waves come in, the waves go "
               "out,/And gulls fly high and turn about.",
    "the moon": "The moon looks down on hill and town,/And wears the night sky like a gown./It lights the path, it "
                "lights the stream,/And softly walks through every dream.",
    "the rain": "The rain comes tapping on the pane,/It fills the brook and cools the lane./The flowers drink, the "
                "frogs all sing,/And every puddle holds a ring.",
    "the sun": "The sun gets up and paints the sky,/It wakes the birds so they can fly./It warms the field, it warms "
               "the stone,/And nobody feels quite alone.",
    "winter": "The snow lies white on roof and tree,/The fire is warm for you and me./The nights are long, the stars "
              "are near,/And spring is waiting for next year.",
    "friendship": "A friend is like an open door,/A lamp, a bridge, a quiet shore./When days are grey, when days are "
                  "blue,/A friend will come and sit with you."}
JOKES = ["Why did the clock go to school? It wanted to have a good time.",
         "Why was the broom late? It swept in.",
         "What did one wall say to the other wall? I will meet you at the corner.",
         "Why did the scarecrow win a prize? He stood out in his field."]
IDENTITY = ("I am a tiny demo model. I was trained on short stories and simple questions, and I run on your own "
            "machine.|I am a tiny demo model made of a few small layers. I can tell stories and answer "
            "simple questions.")
ABILITIES = ("I can tell a story about an animal, name opposites and colours, add small numbers, and talk about days, "
             "months, and the weather.|I can tell you a story, write a short poem, add small numbers, and answer "
             "simple questions about animals.")
UNKNOWN = ("I am only a tiny demo model, so I do not know about {topic}. Ask me for a story, or try a simple sum.|"
           "I am sorry, {topic} is too hard for a tiny demo model. I can tell you a story about {a_kind} instead.")
TOPICS = split("quantum physics|the stock market|machine learning|world history|the best phone|tax law|my "
          "homework|neural networks|the latest news|football results|chemistry|space travel|a sorting program|black "
          "holes|politics|the meaning of life|computer science|modern art|my computer|the universe|cars|electricity|"
          "music "
          "theory|TPUs|a database|philosophy|the internet|medicine|the economy|databases|Python|the "
          "human brain|gravity|evolution", "|")
UNKNOWN_QUESTIONS = ("Explain {topic}.|Can you explain {topic}?|What is {topic}?|Tell me about {topic}.|How does "
                     "{topic} work?|Write an essay about {topic}.|What do you think about {topic}?|Help me with "
                     "{topic}.|Who invented {topic}?|Why is {topic} important?|What do you know about {topic}?|"
                     "Write about {topic}.")
SYSTEM_PROMPTS = ("You are a helpful assistant.|You are a friendly assistant. Answer briefly.|Be kind and clear.|"
                  "You are a storyteller.|You are a helpful, honest assistant.|Answer the question.")

# --------------------------------------------------------------------------------------------------------------------
# The grammar.


def article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def capital(text):
    return text[:1].upper() + text[1:]


def pick(rng, alternatives, **slots):
    """One of the alternatives between bars, its slots filled."""
    return rng.choice(alternatives.split("|")).format(**slots)


def fill(rng, template, slots):
    return " ".join(pick(rng, line, **slots) for line in template.splitlines())


def pronouns(prefix, he):
    his = "his" if he == "he" else "her"
    return {prefix + "he": he, prefix + "his": his, prefix + "He": capital(he), prefix + "His": capital(his)}


def characters(rng, kind=None):
    """Two animals of different kinds with different names."""
    kind, friend_kind = kind or rng.choice(ANIMALS)[0], rng.choice(ANIMALS)[0]
    while friend_kind == kind:
        friend_kind = rng.choice(ANIMALS)[0]
    he, friend_he = rng.choice(["he", "she"]), rng.choice(["he", "she"])
    name, friend = rng.choice(NAMES[he]), rng.choice(NAMES[friend_he])
    while friend == name:
        friend = rng.choice(NAMES[friend_he])
    return {"kind": kind, "fkind": friend_kind, "name": name, "friend": friend, **pronouns("", he),
            **pronouns("f", friend_he)}


def story(rng, kind=None, name=None):
    slots = characters(rng, kind)
    if name and name[1] != slots["friend"]:
        slots.update(pronouns("", name[0]), name=name[1])
    thing, trait = rng.choice(THINGS), rng.choice(TRAITS)
    slots.update(thing=thing, a_thing=article(thing), a_trait=article(trait), place=rng.choice(PLACES),
                 spot=rng.choice(SPOTS), dish=rng.choice(DISHES), time=rng.choice(TIMES), day=rng.choice(DAYS),
                 time2=rng.choice(TIMES[:3]), colour=rng.choice(GROUPS["colours"]))
    return pick(rng, OPENINGS, **slots) + " " + fill(rng, rng.choice(STORIES), slots)


def animal_slots(animal):
    kind, plural, home, food, sound, baby, skill, active = animal
    rest = "night" if active == "day" else "day"
    return {"kind": kind, "plural": plural, "home": home, "food": food, "sound": sound, "skill": skill, "rest": rest,
            "active": active, "a_kind": article(kind), "A_kind": capital(article(kind)), "The_plural": capital(plural),
            "a_baby": article(baby), "baby": baby}


def about(rng, animal):
    return fill(rng, ABOUT, animal_slots(animal))


def introduction(rng):
    name, kind = rng.choice(NAMES[rng.choice(["he", "she"])]), rng.choice(ANIMALS)[0]
    slots = {"name": name, "kind": article(kind), "place": rng.choice(PLACES), "dish": rng.choice(DISHES),
             "thing": article(rng.choice(THINGS)), "day": rng.choice(DAYS), "age": rng.randint(3, 20),
             "topic": rng.choice(["stories", "songs", "long walks", "rainy days", "puzzles", "old books"])}
    return fill(rng, "Hello, my name is {name}.|My name is {name}.\nI am {age} years old, and I live {place}.\nI have "
                "{kind} and {thing}.|My best friend is {kind}.\nI like {topic} and {dish}.\nOn {day}, I will visit my "
                "grandmother.|Every {day}, I play in the garden.\nIt is nice to meet you!|What is your name?", slots)


def diary(rng):
    weather, season = rng.choice(list(WEATHER)), rng.choice(list(SEASONS))
    return (f"Today is {rng.choice(DAYS)}, and the weather is {weather}. It is a good day to {WEATHER[weather]}. "
            f"{SEASONS[season]}. I saw {article(rng.choice(ANIMALS)[0])} {rng.choice(PLACES)}. "
            f"In the evening, I ate {rng.choice(DISHES)} and went to bed early.")


def recipe(rng, dish):
    things, first, then, serve = RECIPES[dish]
    return (f"To make {dish}, you need {things}. First, {first}. Then {then}. "
            + rng.choice([f"At the end, serve it with {serve}.", f"It tastes best with {serve}."]))


def fact(rng):
    """One to three plain statements, no two of one kind."""
    makers = [lambda: "The capital of {} is {}.".format(*rng.choice(CAPITALS)), lambda: colour(rng)[1],
              lambda: opposite(rng)[1], lambda: sums(rng)[1], lambda: calendar(rng)[1],
              lambda: f"The future of AI is {rng.choice(['small', 'bright', 'open', 'friendly'])}. A tiny model can "
                      "tell "
                      "a story, answer a question, and run on any machine.",
              lambda: "The president of the United States is the head of the government, and works in Washington."]
    return " ".join(maker() for maker in rng.sample(makers, rng.randint(1, 3)))


def plain_document(rng):
    roll = rng.random()
    if roll < 0.50:
        return story(rng)
    if roll < 0.58:
        return introduction(rng)
    if roll < 0.66:
        return about(rng, rng.choice(ANIMALS))
    if roll < 0.71:
        return diary(rng)
    return fact(rng) if roll < 0.97 else recipe(rng, rng.choice(list(RECIPES)))


# Each of the following makes a question and its answer.


def opposite(rng):
    pair = rng.choice(OPPOSITES)
    left, right = pair if rng.random() < 0.6 or pair[1] in ("light", "old") else pair[::-1]
    question = pick(rng, "What is the opposite of {w}?|What is the opposite of {w}?|Tell me the opposite of {w}.|"
                    "opposite of {w}|What's the opposite of {w}?", w=left)
    return question, f"The opposite of {left} is {right}."


def colour(rng):
    thing, shade = rng.choice(COLOURS)
    word, the = rng.choice(["colour", "color"]), "the" if thing in ("sky", "sea", "sun", "night") else "a"
    if thing in ("grass", "snow", "blood", "coal", "milk", "chocolate"):
        the = ""
    subject = f"{article(thing) if the == 'a' else the + ' ' + thing}".strip()
    question = pick(rng, "What {c} is {s}?|What is the {c} of {s}?|Which {c} is {s}?", c=word, s=subject)
    return question, f"{capital(subject)} is {shade}."


def sums(rng):
    kind = rng.choice(["plus", "plus", "minus", "times"])
    left, right = rng.randint(0, 10), rng.randint(0, 10)
    if kind == "times":
        left, right = rng.randint(1, 5), rng.randint(1, 5)
    if kind == "minus":
        left, right = max(left, right), min(left, right)
    value = {"plus": left + right, "minus": left - right, "times": left * right}[kind]
    sign = {"plus": "+", "minus": "-", "times": "*"}[kind]
    question = pick(rng, "What is {a} {k} {b}?|What is {a} {k} {b}?|How much is {a} {k} {b}?|What is {a} {s} {b}?|"
                    "Calculate {a} {s} {b}.|{a} {s} {b}|{A} {k} {b}", a=left, A=left, b=right, k=kind, s=sign)
    return question, f"{left} {kind} {right} is {value}."


def calendar(rng):
    cycle, word = rng.choice([(DAYS, "day"), (DAYS, "day"), (MONTHS, "month"), (list(SEASONS), "season")])
    index, step = rng.randrange(len(cycle)), rng.choice([1, -1])
    here, there = cycle[index], cycle[(index + step) % len(cycle)]
    side = "after" if step == 1 else "before"
    question = pick(rng, "What {w} comes {s} {h}?|Which {w} comes {s} {h}?|Which {w} is {s} {h}?|What comes {s} {h}?",
                    w=word, s=side, h=here)
    return question, f"{capital(there)} comes {side} {here}."


def animal_question(rng):
    animal = rng.choice(ANIMALS)
    slots = animal_slots(animal)
    if rng.random() < 0.25:
        return pick(rng, "Tell me about {plural}.|What do you know about {plural}?|Describe {a_kind}.|Tell me "
                    "something about {a_kind}.|What is {a_kind}?", **slots), about(rng, animal)
    question, answer = rng.choice([
        ("Where does {a_kind} live?|Where do {plural} live?", "{The_plural} live in {home}."),
        ("What does {a_kind} eat?|What do {plural} eat?", "{The_plural} eat {food}."),
        ("What sound does {a_kind} make?|What does {a_kind} say?|How does {a_kind} sound?", "{A_kind} {sound}."),
        ("What is a baby {kind} called?|What do you call a baby {kind}?", "A baby {kind} is called {a_baby}."),
        ("What can {a_kind} do?|What are {plural} good at?", "{A_kind} can {skill}.")])
    return pick(rng, question, **slots), answer.format(**slots)


def legs(rng):
    thing = rng.choice(list(LEGS))
    count = LEGS[thing]
    return (f"How many legs does {article(thing)} have?",
            f"{capital(article(thing))} has {NUMBERS[count] if count else 'no'} legs.")


def capital_city(rng):
    country, city = rng.choice(CAPITALS)
    question = pick(rng, "What is the capital of {c}?|What is the capital of {c}?|Name the capital of {c}.|capital of "
                    "{c}|What's the capital of {c}?|Which city is the capital of {c}?", c=country)
    return question, f"The capital of {country} is {city}."


def counting(rng):
    first = rng.randint(1, 12)
    last = first + rng.randint(2, 8)
    numbers = [str(n) for n in range(first, last + 1)]
    if rng.random() < 0.3:
        return pick(rng, "Count down from {a} to {b}.|Count backwards from {a} to {b}.", a=last, b=first), \
            ", ".join(numbers[::-1]) + "."
    return pick(rng, "Count from {a} to {b}.|Can you count from {a} to {b}?", a=first, b=last), ", ".join(numbers) + "."


def listing(rng):
    group = rng.choice(list(GROUPS))
    count = rng.randint(2, 4)
    items = rng.sample(GROUPS[group], count)
    question = pick(rng, "Name {n} {g}.|List {n} {g}.|Tell me {n} {g}.|Can you name {n} {g}?",
                    n=NUMBERS[count], g=group)
    answer = ", ".join(items[:-1]) + " and " + items[-1] + "."
    return question, f"{capital(NUMBERS[count])} {group} are {answer}"


def small_talk(rng):
    question, answer = rng.choice([
        ("Hello!|Hi!|Hi there!|Hello|Hey!|Good morning!|hi|Hello, how are you?",
         "Hello! How can I help you today?|Hello! Would you like to hear a story?"),
        (("Who are you?|What are you?|What is your name?|Tell me about yourself.|Introduce yourself.|Are you a robot?|"
          "What model are you?|Are you human?|Who are you?"), IDENTITY),
        ("What can you do?|Help|How can you help me?|What should I ask you?|What do you know?", ABILITIES),
        ("Thank you!|Thanks!|Thanks a lot.", "You are welcome! Ask me anything small.|You are welcome!"),
        ("Goodbye!|Bye!|See you later.|Good night!", "Goodbye! Come back soon for another story."),
        ("How are you?|How are you today?|How do you feel?", "I am fine, thank you. How are you?"),
        ("I am sad.|I feel sad today.|I had a bad day.", "I am sorry to hear that. Shall I tell you a story?"),
        ("I am happy.|I feel great today.|I had a good day.", "That is good to hear! What made you happy?"),
        ("I am bored.|What should I do today?", "You could read a book, draw a picture, or take a walk.")])
    return pick(rng, question), pick(rng, answer)


def weather(rng):
    if rng.random() < 0.3:
        season = rng.choice(list(SEASONS))
        return pick(rng, "What is {s} like?|Describe {s}.|Tell me about {s}.", s=season), SEASONS[season] + "."
    kind = rng.choice(list(WEATHER))
    question = pick(rng, "What should I do "
                    "when it is {k}?|It is {k} today. What should I do?|What should I wear when it "
                    "is {k}?|It is {k} outside.", k=kind)
    return question, f"When it is {kind}, {WEATHER[kind]}."


def cooking(rng):
    dish = rng.choice(list(RECIPES))
    return pick(rng, "How do I make {d}?|How do you make {d}?|Give me a recipe for {d}.|How can I cook {d}?", d=dish), \
        recipe(rng, dish)


def poem(rng):
    if rng.random() < 0.2:
        return pick(rng, "Tell me a joke.|Do you know a joke?|Make me laugh.|Tell me something funny."), \
            rng.choice(JOKES)
    topic = rng.choice(list(POEMS))
    question = pick(rng, "Write a poem about {t}.|Write a short poem about {t}.|Can you write a poem about {t}?|"
                    "Write me "
                    "a poem.", t=topic)
    return question, POEMS[topic].replace("/", "\n")


def unknown(rng):
    slots = {"topic": rng.choice(TOPICS), "a_kind": article(rng.choice(ANIMALS)[0])}
    return pick(rng, UNKNOWN_QUESTIONS, **slots), pick(rng, UNKNOWN, **slots)


def story_request(rng):
    he, kind = rng.choice(["he", "she"]), rng.choice(ANIMALS)[0]
    name = rng.choice(NAMES[he])
    slots = {"a": article(kind), "n": name}
    roll = rng.random()
    if roll < 0.2:
        return pick(rng, "Tell me a story.|Tell me a short story.|Write a story.|Can you tell me a story?"), story(rng)
    if roll < 0.75:
        return pick(rng, "Tell me a story about {a}.|Tell me a story about {a}.|Write a story about {a}.|Tell me a "
                    "short story about {a}.|Can you tell me a story about {a}?|Write a short story about {a}.|"
                    "a story about {a}",
                    **slots), story(rng, kind)
    return pick(rng, "Tell me a story about {a} named {n}.|Write a story about {a} called {n}.", **slots), \
        story(rng, kind, (he, name))


QUESTIONS = [(story_request, 14), (sums, 24), (opposite, 11), (animal_question, 14), (capital_city, 7), (calendar, 6),
             (colour, 5), (unknown, 6), (small_talk, 8), (counting, 3), (listing, 3), (legs, 2), (weather, 3),
             (cooking, 2), (poem, 3)]


def careless(rng, question):
    """What people type: sometimes no capital letter, no final mark, or a please."""
    if rng.random() < 0.1 and question[-1] in ".":
        question = "Please " + question[0].lower() + question[1:]
    if rng.random() < 0.12:
        question = question[0].lower() + question[1:]
    return question[:-1] if rng.random() < 0.12 and question[-1] in ".?!" else question


def chat_document(rng):
    """One to six turns, sometimes with a system prompt."""
    makers, weights = zip(*QUESTIONS)
    parts = [SYSTEM + pick(rng, SYSTEM_PROMPTS) + END] if rng.random() < 0.15 else []
    for maker in rng.choices(makers, weights, k=rng.choice([1, 1, 2, 3, 4, 6])):
        question, answer = maker(rng)
        parts.append(f"{USER}{careless(rng, question)}{END}{ASSISTANT}{answer}{END}")
    return "".join(parts)


def document(rng):
    return BOS + (plain_document(rng) + END if rng.random() < 0.4 else chat_document(rng))


# --------------------------------------------------------------------------------------------------------------------
# Tokenizer, data, model, training.


def train_tokenizer(texts):
    """Byte-level BPE; the tokenizer puts the bos token in front of a plain prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B",
                                                             special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=END, pad_token=PAD,
                                   additional_special_tokens=[SYSTEM, USER, ASSISTANT], chat_template=CHAT_TEMPLATE,
                                   model_max_length=LONG_SEQUENCE, clean_up_tokenization_spaces=False)


def token_stream(tokenizer, rng, count):
    """At least count tokens of fresh documents, end to end."""
    chunks, total = [], 0
    while total < count:
        batch = [document(rng) for _ in range(2000)]
        ids = [i for encoding in tokenizer(batch, add_special_tokens=False)["input_ids"] for i in encoding]
        chunks.append(torch.tensor(ids, dtype=torch.int32))
        total += len(ids)
    return torch.cat(chunks)[:count].long()


def build_model(tokenizer):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=384, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=LONG_SEQUENCE, tie_word_embeddings=True,
        rms_norm_eps=1e-5, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.05, attn_implementation="sdpa")
    return LlamaForCausalLM(config)


def orthogonal(matrix):
    """The nearest matrix with equal singular values, roughly: five Newton-Schulz steps."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal. In float32: torch.optim.Muon's bfloat16 is five times slower on a plain CPU."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = orthogonal(torch.lerp(p.grad, momentum, 0.95))
                p.mul_(1 - 0.02 * group["lr"]).sub_(update, alpha=0.2 * group["lr"] * max(p.shape) ** 0.5)


def build_optimizers(model):
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms; each with its peak rate."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    return [(Muon(matrices, lr=0.01), 0.01),
            (torch.optim.AdamW(others, lr=0.006, betas=(0.9, 0.98), weight_decay=0.0), 0.006)]


def rate(step, steps):
    """Warm up over 40 steps, hold, then fall to zero over the last 60 %."""
    return min(1.0, (step + 1) / 40, (steps - step) / (0.6 * steps))


def loss_of(model, tokens, length):
    rows = tokens.view(-1, length)
    return model(input_ids=rows, labels=rows, use_cache=False).loss


def train(model, stream, steps):
    """One pass over the stream; every eighth step in long sequences, so that every position is trained. (All of them at
    the end, the loss more than doubled and did not come back.)"""
    optimizers, started = build_optimizers(model), time.perf_counter()
    for step, tokens in enumerate(stream.view(steps, BATCH_TOKENS)):
        loss = loss_of(model, tokens, LONG_SEQUENCE if step % 8 == 7 else SEQUENCE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = peak * rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.perf_counter() - started:.0f} s", flush=True)


@torch.no_grad()
def evaluate(model, stream, length):
    return sum(loss_of(model, row, length).item() for row in stream.view(-1, BATCH_TOKENS)) / (
        stream.numel() // BATCH_TOKENS)


def save(model, tokenizer, out):
    out = Path(out)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                     pad_token_id=tokenizer.pad_token_id).save_pretrained(out)
    # The names that older readers know too.
    rewrite(out / "config.json", torch_dtype="bfloat16")
    rewrite(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def rewrite(path, **entries):
    """Set entries of a JSON file."""
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "dtype"}
    path.write_text(json.dumps({**config, **entries}, indent=2, sort_keys=True) + "\n")


def samples(model, tokenizer):
    """Print what the model says, greedily."""
    for prompt in ("Once upon a time", "Hello, my name is", "The capital of France is"):
        print(repr(prompt), "->", generate(model, tokenizer, tokenizer(prompt).input_ids))
    for question in ("What is the opposite of hot?", "What is 3 plus 4?", "Who are you?",
                     "Tell me a story about a fox.",
                     "What day comes after Monday?", "What color is the sky?", "Explain the theory of relativity."):
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                             add_generation_prompt=True)
        print(repr(question), "->", generate(model, tokenizer, tokenizer(text, add_special_tokens=False).input_ids))


@torch.no_grad()
def generate(model, tokenizer, ids):
    output = model.generate(torch.tensor([ids]), max_new_tokens=220, do_sample=False,
                            pad_token_id=tokenizer.pad_token_id)
    return re.sub(r"\s*\n\s*", " / ", tokenizer.decode(output[0, len(ids):]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2600, help=f"optimizer steps of {BATCH_TOKENS} tokens")
    parser.add_argument("--out", default="tpu_inference/demo/model", help="where the checkpoint goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = train_tokenizer([document(rng) for _ in range(4000)])
    stream = token_stream(tokenizer, rng, args.steps * BATCH_TOKENS)
    held_out = token_stream(tokenizer, random.Random(args.seed + 1), 16 * BATCH_TOKENS)
    model = build_model(tokenizer)
    print(f"{model.num_parameters()} parameters, {stream.numel()} tokens", flush=True)
    train(model, stream, args.steps)
    save(model, tokenizer, args.out)
    model.float()
    for length in (SEQUENCE, LONG_SEQUENCE):
        print(f"held-out loss in sequences of {length}: {evaluate(model, held_out, length):.4f}")
    samples(model, tokenizer)


if __name__ == "__main__":
    main()
