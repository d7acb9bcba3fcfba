"""The words that rules cannot know: irregular plurals, pluralia tantum, stop nouns, compounds."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


IRREGULAR = {
    "people": "person", "oxen": "ox", "leaves": "leaf", "selfies": "selfie", "veggies": "veggie",
    "smoothies": "smoothie", "hoodies": "hoodie", "calories": "calorie", "lassies": "lassie",
    "passers-by": "passer-by", "dice": "dice", "brioches": "brioche", "creches": "creche",
    "floes": "floe", "paparazzi": "paparazzo",
}  # fmt: skip
"""Plural to singular where the lexicon and the rules of `ops.singular` are wrong. The singular of
people is person, as in the class lists of segmentation data sets."""

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
"""Plurals without a singular, which stay unchanged."""

DRINKS = _words("wine beer water juice milk champagne cocktail martini shot pint drinking")
"""Words before `glasses` that mean drinking glasses."""

SINGULARS_IN_S = _words(
    """
    lens canvas atlas bias alias pancreas christmas chaos cosmos ethos kudos rhinoceros molasses
    summons measles diabetes rabies billiards checkers darts tapas pampas madras adidas always
    texas kansas arkansas vegas dallas athens wales mars triceratops thermos rhinoceros
    """
)
"""Singulars that end like plurals, however they are tagged."""

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

    illustration diagram cartoon watercolor watercolour artwork art clipart clip-art render
    rendering sketch doodle screenshot infographic portrait caricature anime animation photography
    series version herd flock swarm handful multitude plethora abundance plenty
    lighting perspective resolution bokeh aesthetic composition autumn winter summer tomorrow
    yesterday
    """
)
"""Nouns without a region in the image: views, positions, media, quantities, times, abstract
things."""

DEPICTIONS = _words(
    """
    painting drawing poster collage mural mosaic print engraving etching lithograph tapestry sticker
    wallpaper graphic vector icon
    """
)
"""Media that are also things: not nouns where the caption says what they show (`a painting of
sunflowers`), or where they stand alone between commas (`a dog, digital painting`)."""

MATERIALS = _words(
    """
    pencil ink oil chalk charcoal crayon pastel pen acrylic gouache watercolor watercolour wash
    pixel vector concept digital stock clip comic line brush studio anime cartoon
    """
)
"""Words that describe the medium after them: `pencil drawing`, `ink wash painting`."""

TAKES_FIRST = _words(
    "game match play competition event tournament race lighting version style aesthetic"
)
"""Stop nouns that also rule out the noun before them: `tennis match` has no region for tennis."""

AMOUNTS_OF = _words(
    """
    couple base body school pride pack cluster batch range stream
    """
)
"""Nouns that are quantities before `of`: `a school of fish`."""

NEGATIONS = _words("no without sans lacking minus zero")
"""Words that negate the noun phrase after them."""

COLOURS = _words(
    """
    red green blue yellow orange purple pink brown black white gray grey beige tan maroon teal
    turquoise magenta cyan crimson scarlet navy indigo gold silver multicolor multicolored colored
    coloured
    """
)
"""Never nouns in the singular, except `orange` as the fruit (`noun_extraction._is_fruit`)."""

PERSONS = _words(
    "man woman boy girl guy lady gentleman person male female couple kid child toddler"
)
"""Nouns that do not begin a compound: `man skateboard` is two nouns."""

ING_NOUNS = _words(
    """
    building ceiling wedding clothing string king ring wing spring lightning icing awning railing
    evening morning earring sibling duckling painting pudding flooring lighting plumbing crossing
    topping frosting dressing siding landing bedding seating swing drawing carving
    """
)
"""Words in -ing that are nouns beside another noun, where others are verbs or adjectives."""

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
    "wind turbine", "black hole", "rocking chair", "stained glass", "stained glass window",
    "sailing ship", "sailing boat", "sailing fishing boat", "fishing rod", "fishing pole",
    "fishing net", "rowing boat", "racing car", "race car", "grand piano", "hot air balloon",
    "red panda", "giant panda", "guinea pig", "grizzly bear",
    "killer whale", "blue whale", "great white shark", "bald eagle", "golden retriever",
    "french bulldog", "german shepherd", "praying mantis", "sea lion", "wild boar", "flying saucer",
    "flying fish", "hot tub", "high heel", "full moon", "crescent moon", "shooting star",
    "vending machine", "sewing machine", "slot machine", "folding chair", "watering can",
    "watering hole", "wedding dress", "wedding cake", "wedding ring", "swimming trunks",
    "bathing suit", "boxing glove", "boxing ring", "chopping board", "carving knife", "baking tray",
    "cooking pot", "drinking fountain", "drinking glass", "dressing table", "measuring cup",
    "measuring tape", "knitting needle", "playing card", "paving stone", "reading glasses",
    "recycling bin", "spinning wheel", "spinning top", "climbing wall", "running track",
    "training wheel", "landing gear", "wrapping paper", "writing desk", "hiking boot",
    "riding boot", "skipping rope", "spiral staircase", "electric car", "acoustic guitar",
    "solar system", "milky way", "northern lights", "red carpet", "hard hat", "wet suit",
    "boiled egg", "fried egg", "scrambled egg", "poached egg", "fried rice", "fried chicken",
    "mashed potato", "baked potato", "grilled cheese", "grilled cheese sandwich", "iced tea",
    "iced coffee", "soft drink", "whipped cream", "hot chocolate", "hot sauce", "sour cream",
    "barbed wire", "picket fence", "picture frame", "photo frame", "photo album", "photo booth",
    "art gallery", "art museum", "movie poster", "comic book", "print shop", "no parking sign",
    "no smoking sign", "no entry sign", "changing table", "merry go round", "jack o lantern",
    "ferris wheel", "roller coaster", "spring roll", "spring onion", "red pepper", "green pepper",
    "green onion", "black bean", "white wine", "red wine", "brown sugar", "big ben",
    "charging station", "filling station", "loading dock", "sliding door", "revolving door",
    "folding table", "hanging basket", "snowy owl", "barn owl", "tree house", "bonsai tree",
    "sports car", "marching band", "wind chime", "wedding gown", "stuffed toy", "flying squirrel",
    "remote controller", "mechanical pencil", "electric scooter", "electric fan",
    "electric toothbrush",
)  # fmt: skip
"""Compounds whose first word may be tagged as a verb or an adjective; always joined if their last
word is tagged as a noun."""

NUMBER_WORDS = _words("two three four five six seven eight nine ten twelve")
"""Words that make the first of two singular nouns after them a measure: `two lane road`."""

LANDMARKS = _words(
    """
    tower bridge bay lake river mount mountain peak island palace cathedral temple castle square
    park museum stadium airport station wall falls canyon valley desert beach church mosque abbey
    gate hotel building arch opera house chapel harbour harbor basilica pyramid volcano glacier
    fountain garden gardens memorial monument shrine pagoda fort ruins pier market library cape
    """
)
"""Words in names of places that can be regions of an image; in lower case they belong to the name
before them (`Eiffel tower`)."""

NAME_LINKS = _words("of de la le du del della der den di da van von y al el & 's")
"""Small words inside names, between capitalised words: `Statue of Liberty`."""

DATES = _words(
    """
    january february march april may june july august september october november december monday
    tuesday wednesday thursday friday saturday sunday christmas easter halloween thanksgiving
    """
)
"""Capitalised words that are not names of things."""

ADDRESSES = _words(
    """
    street st ave avenue road rd way blvd boulevard drive dr lane highway hwy route interstate
    expressway exit broadway
    """
)
"""Words in names that are written on signs."""

SPELLS = _words('reads read reading says say saying labeled labelled called named intersection "')
"""Words that introduce written text, or what something is called."""
