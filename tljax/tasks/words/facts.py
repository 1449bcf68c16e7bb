"""Capitals with their countries, and things with the names of their kinds."""

_CAPITALS = (
    "Kabul:Afghanistan Tirana:Albania Algiers:Algeria Luanda:Angola Yerevan:Armenia Canberra:Australia "
    "Vienna:Austria Baku:Azerbaijan Manama:Bahrain Dhaka:Bangladesh Bridgetown:Barbados Minsk:Belarus "
    "Brussels:Belgium Belmopan:Belize Thimphu:Bhutan Sarajevo:Bosnia Gaborone:Botswana Brasilia:Brazil "
    "Sofia:Bulgaria Bujumbura:Burundi Ottawa:Canada Santiago:Chile Beijing:China Bogota:Colombia "
    "Zagreb:Croatia Havana:Cuba Nicosia:Cyprus Prague:Czechia Copenhagen:Denmark Quito:Ecuador Cairo:Egypt "
    "Asmara:Eritrea Tallinn:Estonia Addis-Ababa:Ethiopia Suva:Fiji Helsinki:Finland Paris:France "
    "Libreville:Gabon Tbilisi:Georgia Berlin:Germany Accra:Ghana Athens:Greece Conakry:Guinea "
    "Georgetown:Guyana Tegucigalpa:Honduras Budapest:Hungary Reykjavik:Iceland Delhi:India Jakarta:Indonesia "
    "Tehran:Iran Baghdad:Iraq Dublin:Ireland Rome:Italy Kingston:Jamaica Tokyo:Japan Amman:Jordan "
    "Astana:Kazakhstan Nairobi:Kenya Pristina:Kosovo Bishkek:Kyrgyzstan Vientiane:Laos Riga:Latvia "
    "Beirut:Lebanon Maseru:Lesotho Monrovia:Liberia Tripoli:Libya Vilnius:Lithuania Antananarivo:Madagascar "
    "Lilongwe:Malawi Kuala-Lumpur:Malaysia Bamako:Mali Valletta:Malta Nouakchott:Mauritania Chisinau:Moldova "
    "Ulaanbaatar:Mongolia Podgorica:Montenegro Rabat:Morocco Maputo:Mozambique Windhoek:Namibia "
    "Kathmandu:Nepal Managua:Nicaragua Niamey:Niger Abuja:Nigeria Oslo:Norway Muscat:Oman Islamabad:Pakistan "
    "Lima:Peru Warsaw:Poland Lisbon:Portugal Doha:Qatar Bucharest:Romania Moscow:Russia Kigali:Rwanda "
    "Apia:Samoa Dakar:Senegal Belgrade:Serbia Bratislava:Slovakia Ljubljana:Slovenia Mogadishu:Somalia "
    "Madrid:Spain Khartoum:Sudan Paramaribo:Suriname Stockholm:Sweden Bern:Switzerland Damascus:Syria "
    "Taipei:Taiwan Dushanbe:Tajikistan Dodoma:Tanzania Bangkok:Thailand Lome:Togo Tunis:Tunisia Ankara:Turkey "
    "Ashgabat:Turkmenistan Kampala:Uganda Kiev:Ukraine London:England Montevideo:Uruguay Tashkent:Uzbekistan "
    "Caracas:Venezuela Hanoi:Vietnam Sanaa:Yemen Lusaka:Zambia Harare:Zimbabwe Edinburgh:Scotland "
    "Cardiff:Wales"
)

CAPITALS = tuple((city.replace("-", " "), country) for city, country in (one.split(":") for one in _CAPITALS.split()))
"""A capital and its country, where that is one word without an article."""

_KINDS = {
    "fruits fruit": "apples oranges bananas grapes lemons pears peaches cherries plums mangoes strawberries berries",
    "vegetables veggies vegetable": "carrots onions potatoes cabbage beans peas peppers mushrooms lettuce corn spinach",
    "animals animal": "dogs cats horses cows pigs sheep goats lions tigers bears wolves elephants monkeys rabbits",
    "birds bird": "eagles owls ducks geese parrots crows pigeons hawks swans robins ravens sparrows",
    "insects bugs": "ants bees flies beetles wasps mosquitoes spiders moths butterflies",
    "colors color": "red blue green yellow black white brown orange purple pink gray",
    "metals metal": "iron copper gold silver zinc lead nickel tin aluminum steel",
    "vehicles vehicle": "cars trucks buses trains motorcycles vans tanks bikes tractors taxis",
    "instruments instrument": "guitars drums violins pianos flutes trumpets keyboards horns organs",
    "tools tool": "hammers saws drills axes wrenches shovels screws brushes blades",
    "sports sport": "football basketball baseball tennis golf hockey soccer boxing swimming cricket volleyball",
    "countries nations country": "France Germany Spain Italy China Japan India Brazil Canada Egypt Russia Mexico",
    "languages language": "English French Spanish German Russian Chinese Arabic Japanese Italian Hebrew Latin Greek",
    "drinks beverages drink": "coffee tea juice milk water beer wine soda vodka whiskey rum cider",
    "clothes clothing garments": "shirts shoes hats coats socks pants dresses gloves jackets boots jeans skirts",
    "furniture": "tables chairs beds desks sofas benches shelves lamps couches",
    "weapons weapon arms": "guns knives swords rifles bombs pistols arrows spears grenades missiles",
    "diseases illnesses disease": "cancer malaria diabetes tuberculosis polio measles cholera asthma flu Ebola AIDS",
    "flowers flower plants": "roses lilies tulips daisies orchids violets sunflowers",
    "gems gemstones stones jewels": "diamonds rubies emeralds pearls crystals sapphires jade amber",
    "months month": "January February March April May June July August September October November December",
    "professions jobs professionals": "doctors lawyers teachers nurses engineers artists writers farmers cooks pilots",
    "relatives family members": "brothers sisters uncles aunts cousins parents sons daughters mothers fathers",
    "fish seafood": "salmon tuna trout cod sharks bass herring sardines",
    "planets planet worlds": "Mercury Venus Mars Jupiter Saturn Neptune Earth",
    "emotions feelings emotion": "anger fear joy sadness love hate guilt shame grief pride envy",
    "buildings building": "houses churches schools hospitals offices hotels factories castles towers",
    "subjects sciences fields": "physics chemistry biology mathematics geology astronomy history economics",
    "spices herbs": "pepper salt garlic ginger cinnamon basil mint mustard",
    "appliances devices": "refrigerators stoves ovens microwaves fans heaters toasters phones televisions",
}

KINDS = tuple((tuple(names.split()), tuple(members.split())) for names, members in _KINDS.items())
"""Names of a kind, the commonest first, and some of its members."""
