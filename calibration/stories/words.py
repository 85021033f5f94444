"""The words of the stories in `calibration/stories/generator.py`: about 650 different ones, and which of them belong together."""

GIRLS = (
    "Mia",
    "Lily",
    "Anna",
    "Rosa",
    "Nora",
    "Ella",
    "Zoe",
    "Ruby",
    "Lucy",
    "Emma",
    "Ivy",
    "Clara",
    "Jane",
    "Maya",
    "Tess",
    "Holly",
    "Alma",
    "Vera",
    "Greta",
    "Dora",
)
BOYS = (
    "Tom",
    "Ben",
    "Max",
    "Sam",
    "Leo",
    "Jack",
    "Finn",
    "Hugo",
    "Oscar",
    "Noah",
    "Paul",
    "Adam",
    "Theo",
    "Luke",
    "Carl",
    "Eric",
    "Otto",
    "Felix",
    "Peter",
    "Simon",
)
ROLES = (("friend", ""), ("cousin", ""), ("neighbour", ""), ("brother", "he"), ("sister", "she"))
TRAITS = (
    "brave",
    "kind",
    "clever",
    "curious",
    "patient",
    "gentle",
    "honest",
    "cheerful",
    "careful",
    "quiet",
    "friendly",
    "busy",
)
HOMES = (
    "in a small village",
    "in a green valley",
    "on a windy island",
    "near the deep forest",
    "by the blue lake",
    "at the edge of the town",
    "close to the sea",
    "on a high mountain",
)
COLOURS = (
    "red",
    "blue",
    "green",
    "yellow",
    "white",
    "black",
    "brown",
    "pink",
    "purple",
    "orange",
    "grey",
    "silver",
    "golden",
    "striped",
)
TOYS = (
    "kite",
    "ball",
    "drum",
    "boat",
    "doll",
    "scarf",
    "book",
    "bell",
    "lantern",
    "whistle",
    "wagon",
    "puppet",
    "flute",
    "rope",
    "map",
    "sled",
    "mask",
    "robot",
    "puzzle",
    "yoyo",
)
SPOTS = (
    "under the bed",
    "behind the door",
    "in the big box",
    "on the top shelf",
    "beside the stove",
    "below the stairs",
    "inside the cupboard",
    "behind the curtain",
    "under the table",
    "in the hay",
    "behind the well",
    "next to the gate",
    "in the attic",
    "on the windowsill",
    "beneath the bench",
    "behind the barrel",
)
NUMBERS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
GATHERED = (
    ("apple", "apples", "under the old tree"),
    ("plum", "plums", "under the old tree"),
    ("shell", "shells", "on the beach"),
    ("stone", "stones", "on the beach"),
    ("feather", "feathers", "near the nest"),
    ("egg", "eggs", "near the nest"),
    ("mushroom", "mushrooms", "in the forest"),
    ("acorn", "acorns", "in the forest"),
    ("flower", "flowers", "in the meadow"),
    ("berry", "berries", "in the meadow"),
    ("button", "buttons", "on the floor"),
    ("marble", "marbles", "on the floor"),
)
CONTAINERS = ("basket", "bag", "box", "bucket", "hat", "jar")
BROKEN = (  # thing, what happens to it, tool, how the tool mends it
    ("coat", "tore", "needle", "sewed"),
    ("shirt", "tore", "needle", "sewed"),
    ("cup", "cracked", "pot of glue", "glued"),
    ("plate", "cracked", "pot of glue", "glued"),
    ("chair", "broke", "hammer", "nailed"),
    ("fence", "broke", "hammer", "nailed"),
    ("shoe", "came apart", "long string", "tied"),
    ("parcel", "came apart", "long string", "tied"),
)
ANIMALS = (  # animal, what it eats, its home, what it does for the hero in return
    ("rabbit", "carrot", "burrow", "showed them a secret path"),
    ("mouse", "piece of cheese", "hole", "chewed through the old rope"),
    ("bear", "jar of honey", "cave", "carried them over the river"),
    ("squirrel", "nut", "hollow tree", "climbed up and looked far around"),
    ("cat", "cup of milk", "warm corner", "purred and kept them warm"),
    ("dog", "bone", "kennel", "barked and led them home"),
    ("bird", "worm", "nest", "sang a pretty song"),
    ("monkey", "banana", "tall palm", "picked a coconut for them"),
    ("horse", "bundle of hay", "stable", "pulled their heavy cart"),
    ("frog", "fly", "pond", "jumped over a lily"),
)
ELDERS = (
    ("the baker", "he"),
    ("the farmer", "he"),
    ("the teacher", "she"),
    ("the miller", "he"),
    ("the nurse", "she"),
)
NEWS = (
    *(
        f"the {herd} are in the {room}"
        for herd in ("hens", "ducks", "goats", "sheep")
        for room in ("garden", "kitchen", "barn", "school")
    ),
    *(
        f"the {meal} is {state}"
        for meal in ("soup", "bread", "pie", "tea")
        for state in ("ready", "cold", "too salty", "on the table")
    ),
)
WAYS = (  # out, back
    ("past the mill", "past the mill"),
    ("over the bridge", "over the bridge"),
    ("through the woods", "through the woods"),
    ("along the river", "along the river"),
    ("up the hill", "down the hill"),
    ("around the pond", "around the pond"),
    ("across the field", "across the field"),
    ("into the valley", "out of the valley"),
)
SIGHTS = ("castle", "waterfall", "lighthouse", "fair", "harbour", "circus", "ruin", "windmill")
WARES = (
    ("loaf of bread", "baker"),
    ("cake", "baker"),
    ("fish", "fisherman"),
    ("crab", "fisherman"),
    ("pumpkin", "farmer"),
    ("melon", "farmer"),
    ("candle", "merchant"),
    ("ribbon", "merchant"),
)
CONTESTS = (
    "built a tower of {} blocks",
    "threw the ball {} steps far",
    "caught {} fish in the stream",
    "jumped over {} puddles",
    "knew the words of {} songs",
    "carried {} logs to the fire",
)
WEATHER = (  # sign, garment, what happens without it
    ("it began to rain", "boots", "feet got wet"),
    ("it began to snow", "mittens", "hands got cold"),
    ("the sun was very hot", "straw hat", "head got hot"),
    ("a cold wind blew", "thick coat", "whole body shook"),
)
RIDDLES = (  # hint, answer
    ("It rings when you shake it", "bell"),
    ("It flies when the wind blows", "kite"),
    ("It rolls when you kick it", "ball"),
    ("It floats on the water", "boat"),
    ("It tells you a story", "book"),
    ("It shines in the dark", "lantern"),
    ("It shows you the way", "map"),
    ("It keeps your neck warm", "scarf"),
)
SEASONS = ("spring", "summer", "autumn", "winter")
SKIES = ("sunny", "cloudy", "windy", "foggy", "cold", "warm", "rainy", "frosty", "calm", "stormy")
GARMENTS = (
    "cap",
    "jacket",
    "dress",
    "sweater",
    "cape",
    "vest",
    "belt",
    "ribbon",
    "necklace",
    "bow tie",
    "raincoat",
    "pair of socks",
)
CREATURES = (
    *(
        "geese",
        "deer",
        "butterflies",
        "spiders",
        "snails",
        "lizards",
        "owls",
        "cows",
        "pigs",
        "ants",
        "bees",
        "crows",
    ),
    *("foxes", "turtles", "swans", "donkeys"),
)
OUTDOORS = (
    *(
        "beside the fence",
        "on the roof",
        "by the roadside",
        "under a bridge",
        "on a rock",
        "at the crossing",
        "in the mud",
    ),
    *(
        "near the church",
        "along the wall",
        "above the clouds",
        "in the tall grass",
        "between two trees",
        "around the fountain",
    ),
    *("behind the bakery", "at the bus stop", "inside a barrel"),
)
FOODS = (
    *(
        "rice",
        "beans",
        "carrots",
        "potatoes",
        "cheese",
        "noodles",
        "eggs",
        "mushrooms",
        "tomatoes",
        "pancakes",
        "toast",
        "jam",
    ),
    *("butter", "honey", "nuts", "raisins", "cherries", "onions"),
)
DRINKS = ("milk", "water", "tea", "cocoa", "lemonade", "apple juice")
TRADES = (
    "pilot",
    "doctor",
    "cook",
    "sailor",
    "painter",
    "singer",
    "baker",
    "farmer",
    "captain",
    "dancer",
    "builder",
    "king",
)
