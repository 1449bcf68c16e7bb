"""Places, objects, colours, nouns and verbs."""

PLACES = tuple("store garden restaurant school hospital office house station".split())
OBJECTS = tuple("ring kiss bone basketball computer necklace drink snack".split())

COLORS = tuple("red blue green yellow black white brown orange purple pink gray gold silver".split())

DESK_OBJECTS = tuple(
    "pen cup hat book ball key box ring bag coin phone lamp bottle plate shirt card candle clock toy brush mug "
    "notebook pencil wallet watch".split()
)

TYPICAL_COLORS = (
    ("banana", "yellow"), ("lemon", "yellow"), ("sun", "yellow"), ("duck", "yellow"), ("corn", "yellow"),
    ("tomato", "red"), ("strawberry", "red"), ("cherry", "red"), ("rose", "red"), ("brick", "red"), ("blood", "red"),
    ("grass", "green"), ("frog", "green"), ("leaf", "green"), ("cucumber", "green"), ("lime", "green"),
    ("sky", "blue"), ("ocean", "blue"), ("jeans", "blue"), ("whale", "blue"), ("lake", "blue"),
    ("snow", "white"), ("milk", "white"), ("salt", "white"), ("rice", "white"), ("ghost", "white"), ("swan", "white"),
    ("coal", "black"), ("tire", "black"), ("raven", "black"), ("ink", "black"), ("night", "black"),
    ("chocolate", "brown"), ("coffee", "brown"), ("bear", "brown"), ("soil", "brown"), ("wood", "brown"),
    ("carrot", "orange"), ("pumpkin", "orange"), ("tiger", "orange"), ("fox", "orange"),
    ("pig", "pink"), ("flamingo", "pink"), ("plum", "purple"), ("grape", "purple"), ("elephant", "gray"),
    ("mouse", "gray"), ("cloud", "gray"), ("stone", "gray"), ("shark", "gray"),
)  # fmt: skip
"""An object and a colour that it may be said to have."""

EVENTS = tuple(
    "war siege conflict dispute voyage expedition treaty alliance campaign crisis famine drought plague epidemic "
    "rebellion revolution revolt uprising riot strike boycott blockade occupation invasion raid battle struggle feud "
    "truce peace reign dynasty empire regime government administration rule project program plan experiment study "
    "investigation inquiry trial case lawsuit negotiation conference meeting debate discussion festival tournament "
    "competition contest tour journey trip mission quest pilgrimage exile marriage friendship partnership engagement "
    "romance affair courtship career apprenticeship construction renovation restoration reform movement era period "
    "phase season trend fashion boom recession depression panic trade deal contract agreement ban embargo tax "
    "monopoly scandal scheme conspiracy plot hunt search rescue evacuation migration settlement colony order cult "
    "tradition custom ceremony ritual practice sanction test flood storm winter outbreak slump exhibition "
    "collaboration insurgency assault attack operation harvest shortage legacy".split()
)

NOUNS = tuple(
    "boy boys,girl girls,man men,woman women,doctor doctors,teacher teachers,student students,farmer farmers,"
    "lawyer lawyers,artist artists,writer writers,singer singers,driver drivers,soldier soldiers,manager managers,"
    "minister ministers,officer officers,guard guards,nurse nurses,actor actors,author authors,king kings,"
    "parent parents,friend friends,brother brothers,sister sisters,neighbor neighbors,customer customers,"
    "scientist scientists,engineer engineers,pilot pilots,judge judges,player players,coach coaches,dancer dancers,"
    "worker workers,guest guests,visitor visitors,child children,senator senators,reporter reporters,"
    "executive executives,assistant assistants,consultant consultants,athlete athletes,poet poets,critic critics,"
    "victim victims,witness witnesses,leader leaders,captain captains,cousin cousins,uncle uncles,aunt aunts,"
    "expert experts,fan fans,voter voters,prisoner prisoners,scholar scholars,banker bankers,cop cops,"
    "director directors,professor professors,lady ladies,baby babies,thief thieves,patient patients,client clients,"
    "painter painters,sailor sailors,builder builders,hunter hunters,dealer dealers,trader traders,agent agents,"
    "speaker speakers,editor editors,owner owners,tenant tenants,pastor pastors".split(",")
)
"""Singular and plural of words for people."""

NEAR_NOUNS = tuple(
    "car cars,tree trees,house houses,table tables,door doors,window windows,chair chairs,bike bikes,truck trucks,"
    "building buildings,statue statues,bench benches,bridge bridges,road roads,gate gates,wall walls,box boxes,"
    "desk desks,horse horses,dog dogs,boat boats,river rivers,hill hills,tower towers,shop shops,school schools".split(
        ","
    )
)
"""Singular and plural of words for things that somebody can be near."""

VERBS = tuple(
    "is are,was were,has have,does do,likes like,wants want,knows know,thinks think,says say,works work,"
    "needs need,seems seem,looks look,makes make,takes take,runs run,lives live,gives give,goes go,comes come,"
    "plays play,loves love,feels feel,sees see,gets get,believes believe,moves move,talks talk,walks walk,"
    "writes write,speaks speak,reads read,stands stand,appears appear,remains remain,helps help".split(",")
)
"""Third person singular and plural of verbs that can follow a subject."""

RELATIVE_VERBS = tuple(
    "likes like,loves love,knows know,sees see,wants want,needs need,helps help,follows follow,meets meet,"
    "hates hate,calls call,visits visit,trusts trust,supports support,watches watch,hears hear,fears fear,"
    "believes believe,remembers remember,respects respect,admires admire,ignores ignore".split(",")
)
"""The same of verbs that take a person as their object."""

CODE_WORDS = tuple(
    "load size files last name key value path index count start end line text data type mode state result output "
    "input user group level limit offset order width height length color model table field label token server client "
    "address port host time date year month day hour code status error message event action target source item list "
    "node edge graph tree root parent child image page file folder project version option config setting section "
    "block shape scale step rate weight score cost price total average change update request response session task "
    "job test case class method object number string buffer channel stream signal sample frame window view border "
    "margin layer point vector matrix region area map zone route range angle speed force mass energy power pressure "
    "volume space body head arm hand foot eye ear face skin bone blood heart brain".split()
)
"""Nouns that programmers name arguments by."""

STORY_WORDS = tuple(
    "oil column piece song light river market winter garden bread castle forest metal window summer island ocean "
    "mountain paper silver stone train station village bridge coffee dinner doctor farmer music spring storm sugar "
    "teacher theater valley water wheel wood crime unit dark tape phase story page time field boat horse city letter "
    "school party member church street night morning evening hotel kitchen family army league season trade law "
    "science history language culture country nation peace battle victory glass gold iron salt rice fish bird "
    "animal plant flower fruit apple tea milk butter corn".split()
)
"""Nouns that descriptions are made of."""
