"""Word lists for values: names of many cultures, syllables of invented words, things of a kind.

Pure data. The lists are closed; values.py makes open sets from them.
"""

from __future__ import annotations

FEMALE_NAMES = (
    "Anna Clara Elena Grace Ines Kate Maria Nora Paula Rosa Tessa Vera Yara Bella Dora Fiona Hanna Julia Laura Nina Priya "
    "Sofia Ursula Wendy Aisha Edith Greta Irene Lena Olga Amara Beatriz Chiara Dilnoza Eszter Fatima Gulnara Hina Ingrid "
    "Jadwiga Keiko Leilani Mei Ngozi Oksana Parisa Rukmini Sigrid Thandiwe Ulla Valentina Wanjiru Ximena Yuki Zeynep Zofia "
    "Astrid Brigid Chloe Daria Emine Freya Halima Isabel Jana Katarina Ludmila Mariam Noor Padma Renata Saoirse Tamar Xin"
).split()
MALE_NAMES = (
    "Ben David Felix Hugo Jonas Leo Oscar Quentin Samuel Ulrich Walter Adam Cyril Emil Gustav Ivan Karl Martin Otto Rahim "
    "Tom Victor Bruno Chen Diego Farid Henry Jack Mateo Noah Abdul Bogdan Carlos Dmitri Emeka Fabio Giorgos Hiroshi Imran "
    "Javier Kwame Lars Minh Nikolai Omar Pedro Qiang Rafael Sven Tariq Umar Vikram Wei Xavier Yusuf Zoltan Anders Branko "
    "Cedric Dawit Erik Fergus Goran Haruto Idris Jorge Kofi Luca Mehmet Nuno Ondrej Pavel Rashid Sanjay Tomas Viktor Zeki"
).split()
FIRST_NAMES = [*FEMALE_NAMES, *MALE_NAMES]
LAST_NAMES = (
    "Harris Miller Novak Silva Becker Moreau Rossi Keller Larsen Okafor Tanaka Walsh Bright Carter Dalton Fisher Grant "
    "Hughes Irving Jensen Khan Lopez Marsh Nolan Ortega Parker Quinn Reed Sato Turner Underwood Vogel Weber Young Ziegler "
    "Abbott Barnes Cole Drake Ellis Frost Gomez Hall Price Stone Wood Baker Cook Hill West King Bell Fox Wolf Lane Adeyemi "
    "Bianchi Chowdhury Demir Eriksen Fernandes Ghosh Haddad Ivanov Jimenez Kowalski Lindqvist Mbeki Nakamura Oyelaran "
    "Petrov Qureshi Ramirez Suzuki Tran Ueda Virtanen Wang Yilmaz Zhang Almeida Bakker Castillo Dubois Fujita Gruber "
    "Hansen Iyer Johansson Kariuki Lefebvre Mendoza Nguyen Osei Papadakis Rahman Schneider Tadesse Vargas Wojcik Yeboah "
    "O'Brien Van-Dam Mac-Rae Aydin Botha Cohen Duarte Ferrari Horvat Kim Lim Moss Nair Park Rao Singh Toth Vance Zhou"
).split()
SYLLABLES = (
    "ar bel cor dan el fen gar hal is jor kel lun mar nor ol pen ras sil tor ul ver wen yor zan bra cle dri fro gle kri "
    "pla sti tre vin mor ber lan ton ric mond wick ley der ham ford ster ro li na ka mi so ta re do pe bu chi fa go hu "
    "jin ku lo ma ni oz qua rei sha tsu va xa yu zo dro fle gri sko thu wra mun pik dol gan hes tav nim rup sel"
).split()
MONTHS = "January February March April May June July August September October November December".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
JOBS = (
    "a baker,a surveyor,a marine biologist,a bridge engineer,a violin maker,a nurse,a tax adviser,a school teacher,"
    "a pilot,a stage designer,a chemist,a gardener,a translator,an architect,a mechanic,a librarian,a photographer,"
    "a data analyst,a judge,a glass blower,a watchmaker,a geologist,a chef,a vet,a carpenter,a radio host,a midwife,"
    "a train driver,a notary,an optician,a beekeeper,a film editor,a plumber,a dentist,a puppeteer,a diver,a welder,"
    "a cartographer,a court clerk,an organist,a potter,a locksmith,a reporter,a bookbinder,a forester,a stonemason"
).split(",")
SUBJECTS = (
    "physics,law,history,botany,music,economics,medicine,geography,philosophy,chemistry,fine arts,computer science,"
    "mathematics,linguistics,astronomy,civil engineering,theology,marine ecology,statistics,graphic design,logic,"
    "archaeology,nutrition,veterinary medicine,sociology,forestry,film studies,architecture,pharmacy,geology,dance,poetry,"
    "accounting,ceramics,robotics,optics,meteorology,journalism,education,psychology,urban planning,genetics"
).split(",")
COLOURS = (
    "red,blue,white,black,silver,green,orange,yellow,grey,navy blue,ivory,copper,violet,turquoise,sand,brown,pink,gold,"
    "beige,crimson,olive,lilac,cream,bronze,maroon,teal,purple,amber,lime,coral"
).split(",")
SHADES = "dark,light,pale,bright,deep,dusky,spotted,striped,golden,silver,white,black,grey,red,blue".split(",")
KIND_WORDS = (
    "northern,southern,common,wild,mountain,marsh,river,winter,summer,early,giant,dwarf,applied,modern,classic,Alpine,"
    "Baltic,desert,forest,island,coastal,royal,old,fine,mixed,smoked,spiced,fresh,raw,polished,recycled,woven"
).split(",")
MATERIALS = (
    "oak,steel,brass,aluminium,glass,cotton,wool,leather,granite,bamboo,carbon fibre,copper,ceramic,birch,rubber,linen,"
    "stainless steel,cork,marble,nylon,felt,slate,walnut,titanium,silk,clay,concrete,paper,wax,quartz,hemp,zinc,pine"
).split(",")
ANIMALS = (
    "otter,heron,fox,lynx,badger,owl,kestrel,newt,beaver,stoat,hare,raven,adder,toad,kingfisher,wolf,bat,hedgehog,pike,"
    "eagle,marten,crane,gull,seal,dragonfly,boar,magpie,lizard,weasel,carp,goat,donkey,falcon,tortoise,parrot,ibex,elk"
).split(",")
PLANTS = (
    "reed,heather,bramble,willow,alder,moss,fern,sedge,clover,nettle,gorse,juniper,thistle,orchid,ivy,mint,sage,thyme,"
    "lavender,birch,hazel,elder,poppy,iris,broom,bracken,hawthorn,primrose,larch,maple,basil,fennel,yarrow,lupin,rowan"
).split(",")
DISHES = (
    "lentil soup,apple cake,rice,barley bread,pumpkin stew,goat cheese,fish pie,noodles,bean salad,plum jam,porridge,"
    "mushroom risotto,cherry tart,roast beef,dumplings,tofu curry,pickled cabbage,oat biscuits,onion soup,potato salad,"
    "walnut bread,spinach pasta,honey cake,tomato sauce,carrots,chickpeas,trout,yoghurt,pancakes,lamb stew,figs,omelette"
).split(",")
LANGUAGES = (
    "French,German,Swahili,Hindi,Polish,Turkish,Korean,Arabic,Portuguese,Greek,Finnish,Thai,Welsh,Hungarian,Dutch,Tamil,"
    "Czech,Basque,Zulu,Icelandic,Persian,Catalan,Danish,Malay,Urdu,Latin,Irish,Mongolian,Quechua,Estonian,Hausa,Lao"
).split(",")
COUNTRIES = (
    "Peru,Norway,Kenya,Japan,Chile,Poland,Ghana,Vietnam,Portugal,Canada,Iceland,Morocco,Nepal,Austria,Brazil,Finland,"
    "Jordan,Laos,Malta,Oman,Senegal,Tunisia,Uruguay,Zambia,Estonia,Fiji,Georgia,Hungary,Ireland,Latvia,Mexico,Panama"
).split(",")
TITLE_WORDS = (
    "Silent,Golden,Last,Hidden,Broken,Distant,Green,Second,Winter,Burning,Lost,Quiet,Open,Northern,Crooked,Paper,Iron,"
    "Wandering,Hollow,Bright,Endless,Seventh,Forgotten,Blue,Sleeping,Early,Narrow,Rising,Salt,Glass"
).split(",")
TITLE_NOUNS = (
    "River,Garden,Harbour,Letter,Bridge,Song,Mirror,Island,Lantern,Road,Winter,Orchard,Tower,Machine,Map,Voyage,House,"
    "Clock,Forest,Stranger,Window,Compass,Feather,Kingdom,Shadow,Market,Signal,Field,Stone,Storm"
).split(",")
PRODUCTS = "Pro,Plus,Mini,Air,Max,Classic,Compact,Duo,Go,One,Sport,Home,Light,Ultra,Eco,Flex".split(",")
EVENTS = (
    "Festival,Conference,Fair,Summit,Regatta,Marathon,Open Day,Carnival,Gala,Workshop,Congress,Cup,Parade,Market,Jubilee,"
    "Symposium,Concert,Rally,Forum,Biennale"
).split(",")
TEAMS = (
    "Rovers,United,Tigers,Hawks,City,Wanderers,Sharks,Athletic,Comets,Bears,Dynamo,Rangers,Stars,Lions,Falcons".split(
        ","
    )
)
