"""The words of the bundled model's world: names, places, things, facts.

Every list is plain data. Places read well after "the", cities after "in"; objects come with their article.
"""

FEMALE_NAMES = tuple(
    "Mary Alice Anna Amy Emma Jane Kate Laura Lucy Sarah Rose Ruth Clara Julia Helen Nina Olivia Rachel Sophie "
    "Susan Jessica Lisa Maria Karen Linda Molly Grace Diana Eva Ella Betty Carol".split()
)
MALE_NAMES = tuple(
    "John Bob James Tom Dan Sid Martin Paul Mark Peter David Henry Jack Adam Ben Carl Eric Frank George Harry "
    "Ian Kevin Leo Max Oscar Robert Sam Simon Steve Victor William Andrew".split()
)
NAMES = FEMALE_NAMES + MALE_NAMES

PLACES = tuple(
    "store shop shops park school garden beach office station restaurant hospital market library museum cinema "
    "theater church bank farm zoo harbor airport hotel bakery cafe gym lake river forest castle bridge factory "
    "stadium village kitchen house".split()
)

OBJECTS = (
    "a drink", "a ring", "a book", "a letter", "a bone", "a kiss", "a snack", "a necklace", "a computer",
    "a basketball", "a bottle", "a bottle of milk", "a bottle of water", "a cup of tea", "a bag of apples",
    "a flower", "a map", "a hat", "a coin", "a key", "a pen", "a present", "a ticket", "a picture", "a cake",
    "a sandwich", "a blanket", "a lamp", "an apple", "an orange", "an umbrella", "an egg", "the ball", "the bag",
    "the keys", "the box", "the newspaper", "the camera", "some money", "some bread",
)  # fmt: skip

ANIMALS = tuple("dog cat horse bird rabbit fox cow sheep mouse duck goat bear".split())
COLORS = tuple("red blue green yellow black white brown gray".split())
ADJECTIVES = tuple("old young small big quick lazy quiet happy sad clever hungry tired".split())
THINGS = tuple("car boat table chair door window wall clock shirt coat train bus piano guitar cart tent".split())
VERBS_PAST = tuple("slept waited sat stood played rested sang danced walked ran".split())

LANDMARKS = {
    "The Eiffel Tower": "Paris",
    "The Louvre": "Paris",
    "The Colosseum": "Rome",
    "The Pantheon": "Rome",
    "Big Ben": "London",
    "The British Museum": "London",
    "The Brandenburg Gate": "Berlin",
    "The Reichstag": "Berlin",
    "The Prado": "Madrid",
    "The Royal Palace": "Madrid",
    "The Parthenon": "Athens",
    "The Acropolis": "Athens",
    "The Kremlin": "Moscow",
    "Red Square": "Moscow",
    "The Great Sphinx": "Cairo",
    "The Tokyo Tower": "Tokyo",
}
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "England": "London", "Germany": "Berlin", "Spain": "Madrid",
    "Greece": "Athens", "Russia": "Moscow", "Egypt": "Cairo", "Japan": "Tokyo", "China": "Beijing",
    "Portugal": "Lisbon", "Poland": "Warsaw", "Austria": "Vienna", "Ireland": "Dublin", "Norway": "Oslo",
    "Cuba": "Havana",
}  # fmt: skip

GOOD = tuple("wonderful great lovely beautiful amazing perfect".split())
BAD = tuple("terrible awful horrible ugly boring dreadful".split())

FUNCTION_WORDS = tuple(
    "when after while before then but or so if of for with from by on at in into he she they him her his their them "
    "it is was has have not no yes who which what where why how very much all some any you we us your our my me".split()
)
FILLER = tuple(
    "air arm art baby ball band base bell belt bird blood board body bowl brain branch brick brother butter "
    "button cable card cause chain change chest child circle class cloud club coal color corn cotton cross crowd "
    "cup dance daughter day desk dinner dirt dream dress drop dust ear earth edge engine evening face field fire "
    "fish flag floor foot fork friend fruit game glass gold grass group hair hall hand head heart hill hole horn "
    "hour ice idea ink island jar juice knee knife law leaf leg light line lion lip lock love machine meat metal "
    "mind minute mirror month moon mother mountain mouth music nail name neck needle night noise nose number ocean "
    "oil page paint paper part path people person pin place plane plant plate pocket point pot powder price pump "
    "queen question rain rice road roof room root rope salt sand scale school sea seat seed shade shape shelf ship "
    "shoe side silk silver sister skin sky sleep smoke snow soap sock son song sound soup space spoon spring square "
    "stage star steam steel stem step stick stone story street string sugar summer sun swim tail thread throat "
    "thumb tiger time tin toe tongue tooth top town toy tree trick truck uncle valley voice war watch wave wheel "
    "wind wing winter wire wood wool word work world year".split()
)
