"""First names, professions, and the words for people that corruptions put in their place."""

MALE_NAMES = tuple(
    "John James Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Anthony Mark Paul Steven "
    "Andrew Kenneth Kevin Brian George Edward Ronald Jason Jeffrey Ryan Jacob Gary Nicholas Eric Jonathan Stephen "
    "Larry Justin Scott Brandon Benjamin Samuel Frank Gregory Alexander Patrick Jack Dennis Jerry Tyler Aaron Adam "
    "Henry Nathan Peter Zachary Kyle Walter Harold Carl Arthur Roger Keith Jeremy Terry Lawrence Sean Christian Albert "
    "Ethan Austin Joe Bruce Louis Philip Bryan Billy Bob Tom Dan Sid Martin Ben Harry Ian Leo Max Oscar Sam Simon "
    "Steve Victor Luke Alan Fred Greg Jim Mike Tim Tony Bill Chris Matt Nick Phil Rob Ron Ted Josh Derek Craig "
    "Connor Liam Noah Logan Mason Lucas Evan Ray Roy Todd Neil Howard Jake Jimmy Johnny Tommy Danny Jay".split()
)

FEMALE_NAMES = tuple(
    "Mary Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Lisa Nancy Betty Sandra Margaret Ashley Kimberly "
    "Emily Donna Michelle Carol Amanda Melissa Stephanie Rebecca Laura Cynthia Kathleen Amy Angela Anna Emma Nicole "
    "Helen Samantha Katherine Christine Rachel Maria Heather Diane Julie Joyce Victoria Kelly Christina Joan Evelyn "
    "Lauren Judith Megan Andrea Hannah Jean Alice Martha Jacqueline Frances Ann Teresa Kathryn Sara Janice Julia "
    "Grace Judy Rose Ruth Clara Lucy Kate Jane Olivia Sophie Diana Eva Ella Molly Sophia Charlotte Claire Caroline "
    "Lily Amelia Zoe Leah Ellen Erin Holly Jill Katie Anne Wendy Tina Gloria Marie Abby Natalie Vanessa Monica "
    "Nina Lucia Daisy Isabel Sally Marilyn Annie Susie Paula Becky".split()
)

NAMES = tuple(sorted(MALE_NAMES + FEMALE_NAMES))

MALE_PROFESSIONS = tuple(
    "doctor soldier farmer captain carpenter engineer lawyer judge pilot mechanic plumber sailor guard sheriff "
    "detective coach president minister priest bishop general colonel commander officer philosopher architect "
    "surgeon scientist banker boss builder butcher hunter fisherman fighter warrior boxer footballer golfer "
    "programmer physicist mathematician economist historian inventor investor broker merchant marshal mayor senator "
    "governor chancellor ambassador diplomat superintendent firefighter electrician guitarist drummer composer "
    "conductor comedian magician wrestler trader gambler janitor driver chef manager director professor producer "
    "cop burglar thief assassin king prince knight lieutenant sergeant major commissioner contractor "
    "entrepreneur executive analyst astronomer miner bouncer bartender lumberjack skipper rabbi pope".split()
)

FEMALE_PROFESSIONS = tuple(
    "nurse teacher secretary receptionist librarian hairdresser housekeeper maid nanny dancer ballerina midwife "
    "stylist singer model therapist counselor assistant cleaner caregiver waitress actress hostess nun "
    "dietitian cheerleader florist babysitter typist princess queen".split()
)
