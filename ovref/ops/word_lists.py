"""The words that rules cannot know: irregular plurals, pluralia tantum, stop nouns, compounds."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "persons": "person",
    "feet": "foot", "teeth": "tooth", "geese": "goose", "mice": "mouse", "oxen": "ox",
    "knives": "knife", "wives": "wife", "lives": "life", "wolves": "wolf", "halves": "half",
    "leaves": "leaf", "shelves": "shelf", "loaves": "loaf", "scarves": "scarf", "calves": "calf",
    "hooves": "hoof", "elves": "elf", "thieves": "thief", "selves": "self",
    "bookshelves": "bookshelf", "cacti": "cactus", "octopi": "octopus", "fungi": "fungus",
    "hippopotami": "hippopotamus", "quizzes": "quiz", "gases": "gas", "lenses": "lens",
    "canvases": "canvas", "irises": "iris", "atlases": "atlas", "trellises": "trellis",
    "axes": "axe", "pickaxes": "pickaxe", "pies": "pie", "ties": "tie", "neckties": "necktie",
    "lies": "lie", "cookies": "cookie", "movies": "movie", "brownies": "brownie",
    "selfies": "selfie", "zombies": "zombie", "smoothies": "smoothie", "hoodies": "hoodie",
    "calories": "calorie", "birdies": "birdie", "veggies": "veggie", "doggies": "doggie",
    "hippies": "hippie", "rookies": "rookie", "magpies": "magpie", "collies": "collie",
    "prairies": "prairie", "toes": "toe", "shoes": "shoe", "canoes": "canoe",
    "horseshoes": "horseshoe", "snowshoes": "snowshoe", "does": "doe", "foes": "foe",
    "aches": "ache", "headaches": "headache", "avalanches": "avalanche", "quiches": "quiche",
    "mustaches": "mustache", "moustaches": "moustache", "caches": "cache", "niches": "niche",
    "buses": "bus", "uses": "use", "excuses": "excuse", "fuses": "fuse", "muses": "muse",
    "criteria": "criterion", "passersby": "passerby", "passers-by": "passer-by", "dice": "dice",
    "skis": "ski", "taxis": "taxi", "bikinis": "bikini", "kiwis": "kiwi", "zucchinis": "zucchini",
    "zeroes": "zero",
}  # fmt: skip
"""Plural to singular where the rules of `nouns.singular` go wrong. People are persons, as the class
lists of segmentation data sets have it."""

INVARIANT = _words(
    """
    pants jeans shorts trousers slacks khakis leggings tights overalls pajamas pyjamas underpants
    panties sweatpants briefs clothes glasses sunglasses eyeglasses goggles binoculars headphones
    earphones scissors tweezers pliers tongs shears suspenders reins stairs bleachers blinds
    headquarters barracks ruins remains surroundings outskirts belongings groceries leftovers
    fireworks electronics goods sports woods suds news series species crossroads means savings
    sheep deer fish moose bison cattle salmon trout shrimp squid swine aircraft spacecraft
    watercraft offspring poultry livestock wildlife graffiti spaghetti broccoli confetti ravioli
    """
)
"""Plural in form or use: they stay as they are."""

DRINKS = _words("wine beer water juice milk champagne cocktail martini shot pint drinking")
"""Before `glasses` they tell that one drinks from them."""

SINGULARS_IN_S = _words(
    """
    lens canvas atlas bias alias pancreas christmas chaos cosmos ethos kudos rhinoceros molasses
    summons measles diabetes rabies billiards checkers darts tapas pampas madras adidas always
    texas kansas arkansas vegas dallas athens wales mars
    """
)
"""Singular though they end as plurals do; for words that a tagger calls singular."""

STOP_NOUNS = _words(
    """
    photo photograph picture image pic shot snapshot view closeup close-up up scene scenery
    background foreground front back side top bottom left right middle center centre corner end edge
    inside outside interior exterior rear part piece pair group bunch lot number variety assortment
    set array collection selection type kind sort style way thing stuff item object something
    anything everything nothing someone somebody anyone anybody everyone everybody other one color
    colour shape size position place area spot distance direction midair mid-air air time day night
    morning afternoon evening year minute hour moment weekend today dusk dawn half dozen amount bit
    deal fun name idea attention action motion trick turn use display case-by-case form manner
    example look pose ride walk line row order process matching vintage trio preparation progress
    daytime nighttime daylight game match play sport competition event tournament race
    """
)
"""Nouns that name no region of an image: views, positions, quantities, times, abstract things."""

GAMES = _words("game match play competition event tournament race")
"""Stop nouns that take their first word with them: `tennis match` shows no region called tennis."""

COLOURS = _words(
    """
    red green blue yellow orange purple pink brown black white gray grey beige tan maroon teal
    turquoise magenta cyan crimson scarlet navy indigo gold silver multicolor multicolored colored
    coloured
    """
)
"""Never nouns in the singular, but for `orange` where it is the fruit (`nouns._is_fruit`)."""

PERSONS = _words(
    "man woman boy girl guy lady gentleman person male female couple kid child toddler"
)
"""Do not begin a compound: in `man skateboard` there are two nouns."""

ING_NOUNS = _words(
    """
    building ceiling wedding clothing string king ring wing spring lightning icing awning railing
    evening morning earring sibling duckling painting pudding flooring lighting plumbing crossing
    topping frosting dressing siding landing bedding seating swing drawing carving
    """
)
"""Words in -ing that may stand beside another noun; others there are verbs or adjectives."""

COMPOUNDS = (
    "hot dog", "dining table", "dining room", "living room", "parking meter", "parking lot",
    "stop sign", "swimming pool", "washing machine", "cutting board", "potted plant",
    "stuffed animal", "stuffed bear", "double decker bus", "double-decker bus", "remote control",
    "wii remote", "high chair", "rolling pin", "frying pan", "shopping cart", "shopping bag",
    "steering wheel", "mixing bowl", "sleeping bag", "baking sheet", "crossing guard",
    "walking stick", "diving board", "ironing board", "flying disc", "life jacket", "skate park",
    "skate board", "surf board", "snow board", "wind surfer", "fire hydrant", "brick wall",
    "stone wall", "rock wall", "traffic light", "teddy bear", "cell phone", "mobile phone",
    "polar bear", "french fry", "orange juice", "orange slice", "green bean", "bell pepper",
    "sweet potato", "flat screen", "flat screen tv", "stainless steel", "christmas tree",
    "ice cream", "running shoe", "waiting room", "blow dryer", "hair dryer", "hair drier",
    "race track", "counter top", "stove top", "table top", "desk top", "roof top", "hill top",
    "mountain top", "tree top", "solar panel", "electric guitar", "street light", "sand castle",
    "wind turbine",
)  # fmt: skip
"""Compounds whose first word a tagger may well call a verb or an adjective; joined wherever they
stand and their last word is tagged a noun."""
