"""Write the embedded sample corpus: invented movie reviews in the layout of the IMDB archive.

A seeded grammar first invents a few hundred films (title, people, plot) and then lets many people
review them, for or against.  Only `random.Random.random` is drawn from, the one method whose
sequence Python promises to keep, so that every version writes the same reviews.
"""

import argparse
import gzip
import hashlib
import io
import os
import random
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

SEED = 2020
FILMS = 240
FOLDERS = (
    ("train", "pos", (7, 8, 9, 10), 1000),
    ("train", "neg", (1, 2, 3, 4), 1000),
    ("train", "unsup", range(1, 11), 40),
    ("test", "pos", (7, 8, 9, 10), 1000),
    ("test", "neg", (1, 2, 3, 4), 1000),
)
T = TypeVar("T")
Facts = dict[str, str]
BREAKS = (" ", " ", " ", " ", "<br /><br />")
PRONOUNS = {
    "man": {"he": "he", "his": "his", "him": "him"},
    "woman": {"he": "she", "his": "her", "him": "her"},
}
BAG_OF_WORDS_LINES = 20  # the real files have a line for each review, which would double the size
README = """Invented movie reviews in the layout of the Large Movie Review Dataset v1.0

[train/, test/] hold [pos/, neg/] with one review a file, [id]_[rating].txt: a rating of 7 to 10
is positive, of 1 to 4 negative. [train/unsup/] has reviews without a label (rating 0). urls_*.txt
has a made-up address for each review, imdb.vocab the words by frequency, imdbEr.txt the mean
rating of each word less 5.5, labeledBow.feat the first reviews as bags of words in LIBSVM format.
No sentence, film or person in it is real.
"""

# A name at the margin opens a rule; each indented line, and each part between bars, is one of its
# options.  {name} is looked up as a fact of the film, then as name+ or name- (by the review's
# sentiment), as name@genre, and as name.  What begins a sentence may stand in lower case.
GRAMMAR = """
first_man
  Aldous | André | Anton | Barnaby | Björn | Casper | Clement | Dexter | Edgar | Emil | Felix
  Gideon | Hugo | Ignacio | Jasper | José | Jürgen | Lionel | Magnus | Milo | Nils | Octavio
  Oscar | Percy | Quentin | René | Rufus | Silas | Tobias | Victor | Wendell | Yusuf | Alistair
  Bruno | Cyril | Desmond | Fergus | Harold | Loïc | Otto | Rodrigo | Stanley | Théo | Ulysses
first_woman
  Adela | Beatrix | Celeste | Chloé | Cora | Daphne | Edith | Elsa | Esmé | Flora | Greta
  Harriet | Ingrid | Iris | Josephine | Lena | Lucía | Mabel | Maren | Nadia | Noémie | Odette
  Opal | Pearl | Renée | Rosalind | Sabine | Thea | Ursula | Vivian | Wilhelmina | Zoë | Anaïs
  Bridget | Dolores | Eleanor | Gwendolyn | Imogen | Katarina | Lottie | Mercedes | Paloma
  Sigrid | Winifred
last_name
  Abernathy | Alvarado | Ashdown | Bellweather | Björkman | Blackwood | Brandt | Calloway
  Castellane | Crane | Dahl | Delacroix | Dupré | Eastlake | Fairweather | Falk | Fontaine
  Garrick | Grimaldi | Hale | Halloran | Hawthorn | Ibarra | Ishikawa | Jankowski | Kettering
  Kowal | Lachance | Larkin | Lindström | Lockhart | Marchetti | Merriweather | Moreau | Müller
  Nakamura | Núñez | O'Dell | O'Rourke | Okafor | Ostrowski | Pemberton | Pike | Quill
  Ravencroft | Rosetti | Rousseau | Sandoval | Santini | Sinclair | Söderberg | Sorensen | Stroud
  Takeda | Thorne | Underhill | Valdez | Vance | Varga | Voss | Wakefield | Weatherby | Whitlock
  Wren | Yates | Zamora | Zielinski | Zeller | Applegate | Baumgartner | Corrigan | Donahue
  Espinoza | Featherstone | Gallagher | Holloway | Inglewood | Kovács | Leclerc | Montoya
  Norwood | Papadakis | Redfern | Strömberg | Tremblay | Villanueva | Winslow

shape
  opening | opening premise | opening premise | opening comment premise | premise opening
  opening comment | premise comment opening | premise
genre
  horror | comedy | thriller | western | romance | space | war | family
director
  {first_man} {last_name} | {first_woman} {last_name}

title
  The {t_adj} {t_noun} | The {t_adj} {t_noun} | The {t_adj} {t_noun}
  {t_noun} of the {t_adj} {t_noun} | {t_adj} {t_noun} | The {t_noun} and the {t_noun}
  {t_verb} the {t_noun} | {hero}'s {t_noun} | {t_verb} {hero} | A {t_noun} for {hero}
  The Last {t_noun} | {t_number} Days in {place} | {t_noun} {t_roman} | The {t_noun} of {place}
  Goodbye, {t_adj} {t_noun} | {t_when} in {place}
t_adj
  Broken | Crimson | Crooked | Distant | Electric | Empty | Forgotten | Frozen | Gentle | Golden
  Hidden | Hollow | Lonely | Midnight | Paper | Quiet | Restless | Secret | Silver | Stolen
  Velvet | Wicked | Burning | Clever | Dancing | Faithful | Fallen | Grand | Invisible | Laughing
  Scarlet | Silent | Sleeping | Unknown
t_noun@horror
  Cellar | Coffin | Curse | Grave | Lantern | Mask | Mirror | Scream | Shadow | Skull | Whisper
  Witch | Candle | Nightmare | Raven | Tomb
t_noun@comedy
  Banana | Bachelor | Cousin | Dentist | Holiday | Honeymoon | Landlord | Neighbour | Sausage
  Uncle | Umbrella | Wedding | Butcher | Hairdresser | Pickle | Trousers
t_noun@thriller
  Alibi | Cipher | Confession | Deadline | Envelope | Hostage | Informer | Ledger | Motive
  Ransom | Suspect | Witness | Accomplice | Blackmail | Corridor | Stranger
t_noun@western
  Bullet | Canyon | Coyote | Drifter | Gallows | Horseman | Outlaw | Prairie | Rider | Saddle
  Sheriff | Stagecoach | Desperado | Lasso | Mustang | Revolver
t_noun@romance
  Balcony | Bouquet | Garden | Heart | Kiss | Letter | Melody | Orchard | Promise | Rose | Summer
  Waltz | Carousel | Moonlight | Serenade | Violin
t_noun@space
  Asteroid | Comet | Colony | Galaxy | Machine | Orbit | Planet | Robot | Satellite | Signal
  Star | Voyager | Android | Capsule | Meteor | Nebula
t_noun@war
  Barrack | Battalion | Bridge | Bugle | Captain | Flag | Medal | Regiment | Soldier | Trench
  Valley | Winter | Convoy | Fortress | Parachute | Silence
t_noun@family
  Acorn | Balloon | Dragon | Dolphin | Kite | Lighthouse | Owl | Penguin | Puppy | Raccoon
  Treehouse | Wizard | Firefly | Mermaid | Pumpkin | Snowman
t_verb
  Beyond | Return to | Escape from | Chasing | Finding | Killing | Waiting for | Leaving | Saving
  Looking for | Forgetting | Escorting | Dreaming of
t_number
  Two | Three | Five | Seven | Nine | Thirteen
t_roman
  II | III | 2000 | 3000
t_when
  Midnight | Sunday | Christmas | Tuesday | Springtime

place@horror
  Ravenmoor | Black Hollow | Saint Agatha | Cold Harbor | Pinewood | Mill Creek
place@comedy
  Naples | Las Vegas | Brooklyn | Scranton | Biarritz | Miami
place@thriller
  Berlin | Lisbon | Chicago | Prague | Hong Kong | Marseille
place@western
  Dry Gulch | Abilene | Silver Bend | Cold Water | Sonora | Dead Horse
place@romance
  Paris | Vienna | Venice | San Sebastián | Vermont | Provence
place@space
  Mars City | Port Europa | Station Nine | New Geneva | the Titan colony | the Outer Rim
place@war
  Normandy | Burma | Flanders | Crete | Norway | Malta
place@family
  Maple Island | Alaska | Cornwall | Cloudberry Farm | Oregon | Lapland

job@horror
  young nurse | night watchman | grieving architect | college student | struggling novelist
  village priest | babysitter | medical student | real estate agent
job@comedy
  clumsy waiter | failed magician | wedding planner | taxi driver | lazy accountant
  shy librarian | hot dog vendor | divorced dentist | substitute teacher
job@thriller
  retired detective | young lawyer | former spy | bank clerk | police inspector
  newspaper reporter | crooked cop | court translator | forensic pathologist
job@western
  wandering gunslinger | tired sheriff | horse thief | saloon singer | bounty hunter
  cattle rancher | telegraph operator | reformed outlaw | gold prospector
job@romance
  lonely florist | piano teacher | rich banker | struggling painter | pastry chef
  bookshop owner | wedding photographer | ballet dancer | country doctor
job@space
  starship pilot | brilliant engineer | stubborn astronaut | cargo captain | robot mechanic
  young scientist | space marine | radio operator
job@war
  frightened private | army surgeon | tough sergeant | resistance fighter | fighter pilot
  war photographer | ambulance driver | captured officer
job@family
  curious orphan | retired sea captain | ten-year-old inventor | lonely zookeeper | farm kid
  runaway heir | toy maker | junior wizard

goal@horror
  {moves} a {old} {house} where {house_fact} | reads from a {old} book and wakes {monster}
  is stalked by {monster} after a party in the woods
  must spend one night in a {old} {house} to win a bet
  begins to suspect that the new neighbor is {monster}
  finds a {t_thing} that lets the dead speak
moves
  moves into | inherits | gets trapped in | takes a job at
old
  abandoned | ancient | isolated | old | ugly | enormous
house
  house | mansion | hospital | hotel | asylum | monastery | farmhouse
house_fact
  every former owner has vanished | the walls whisper at night | a murder was committed in 1923
  nobody has ever slept a full night | the children speak to {monster} | a clock strikes thirteen
  the mirrors are all covered | seven brides disappeared in 1887
monster
  a vampire | a masked killer | a swamp creature | a vengeful ghost | an army of zombies
  a pack of werewolves | a demon with no face | something much older than man
  the twin sister {he} never had | a plague of rats | an evil doll | the ghost of a drowned sailor
t_thing
  telephone | music box | videotape | mirror | diary | doll
goal@comedy
  accidentally {comic_crime} and has to hide it from {relative}
  pretends to be {disguise} in order to impress {relative}
  loses {his} job and {his} car and moves back in with {relative}
  has three days to {comic_task} before {relative} finds out
  is mistaken for {disguise} by the local mafia
  travels across the country with {relative} and a stolen {comic_animal}
comic_crime
  marries the wrong person | wins the lottery twice | steals a police car | burns down the church
  sells the family restaurant | becomes the mayor | adopts a circus bear | enters a beauty contest
  becomes engaged to two people | insults the pope
relative
  {his} mother | {his} boss | {his} future father-in-law | {his} ex-wife's lawyer
  {his} twin brother | {his} crazy grandmother
disguise
  a famous surgeon | a French count | a professional wrestler | a priest | an opera singer
comic_task
  find a date | learn to dance the tango | raise $50,000 | plan a funeral | teach a parrot to sing
  win a cooking contest | build a swimming pool | find the missing wedding ring
comic_animal
  goat | llama | chimpanzee | pig | ostrich
goal@thriller
  witnesses {crime} and can't trust the police
  is framed for {crime} and has 24 hours to prove {his} innocence
  investigates {crime} in a town full of liars
  receives a {clue} that points to {crime}
  must protect {client} from a professional killer
  follows {client} and uncovers a conspiracy that leads to the president
crime
  a murder on a train | a bank robbery | the kidnapping of a senator's daughter
  a political murder | a series of brutal murders | the theft of a priceless painting
  an assassination at the opera | a jewel heist | the poisoning of a millionaire
  an explosion at the airport
clue
  phone call | blackmail letter | photograph | coded message | severed finger
client
  a key witness | a mysterious blonde | a corrupt judge | a nervous scientist | an old friend
  a runaway accountant | a chess champion | the mayor's wife | a foreign diplomat
goal@western
  rides into {place} to {revenge}
  returns to {place} after ten years in prison and wants to {revenge}
  has to defend the town against {gang}
  escorts a wagon train through the desert, followed by {gang}
  hunts {gang} for a reward of $500
  buries {his} guns and tries to start a farm, until {gang} shows up
revenge
  avenge {his} brother | find the man who burned {his} ranch | collect an old debt
  win back {his} honor | dig up a chest of stolen gold
gang
  a gang of bank robbers | a cruel cattle baron | a corrupt marshal | a band of deserters
  a corrupt railroad company | three brothers with nothing to lose | a preacher with a rifle
goal@romance
  falls in love with {lover} during one summer in {place}
  must choose between {lover} and {lover}
  writes letters to {lover} without ever sending them
  meets {lover} on a train and loses the phone number
  returns to {place} for a wedding and runs into {lover}
  agrees to a fake engagement with {lover} and then really falls in love
lover
  a penniless musician | a married professor | a childhood friend | a handsome stranger
  the boss's son | a charming thief | a dying poet | a soldier on leave | a lighthouse keeper
  a trapeze artist | the new gardener | a jealous count | a blind pianist
goal@space
  travels to {place} to rescue {crew}
  wakes up alone on a ship with {alien}
  discovers that {crew} has been replaced by {alien}
  must repair {device} before the earth is destroyed
  builds {device} and is chased through time by {alien}
  leads a rebellion of robots against {alien}
crew
  a lost expedition | the crew of a mining ship | a colony of 300 people
  the last human scientist | a vanished space station | the first child born in orbit
  a prison planet
alien
  an alien parasite | an evil computer | a race of giant insects | a killer android
  a cloud of living gas | a mysterious black sphere | clones of {his} own family
  an army of mutants | talking plants
device
  a broken reactor | a time machine | the only satellite left | a teleporter
goal@war
  is sent behind enemy lines to {mission}
  is captured in {place} and plans to {mission}
  leads a handful of men who have to {mission}
  deserts from the army in {year_war} and is forced to {mission}
  falls for a nurse one day before {his} regiment is ordered to {mission}
mission
  blow up a bridge | hold a farmhouse against the tanks | rescue a wounded general
  escape through a tunnel | deliver one letter | hide a family in the attic | steal a submarine
  save a cathedral from the bombs | smuggle radios through the mountains | find the missing patrol
year_war
  1916 | 1917 | 1940 | 1942 | 1944
goal@family
  finds a {baby} in the barn and hides it from the grown-ups
  sails to {place} to look for a lost {treasure}
  befriends a {baby} that has to find its way home
  discovers that the {baby} next door can talk
  enters a race against a greedy circus owner to save the {baby}
  saves Christmas with the help of a {baby} and a lost {treasure}
baby
  baby dragon | polar bear cub | talking dog | three-legged pony | grumpy penguin | magic hen
  shy sea monster | lost baby elephant | flying reindeer | two-headed turtle
treasure
  treasure map | lighthouse key | golden bell | snow globe | crown | pirate ship | recipe book
  music box | pocket watch

trouble@horror
  One by one {his} friends disappear | Then the lights go out | Then the bodies start to pile up
  Soon something in the cellar calls {his} name | By midnight nobody can leave
trouble@comedy
  Naturally everything goes wrong | Then {his} ex shows up | Then the police arrive
  Soon there's a corpse in the freezer and a goat in the bathtub | One lie leads to another
trouble@thriller
  Of course nobody is who they seem to be | Then a second body is found
  Soon the hunter becomes the hunted | But the real killer is always one step ahead
trouble@western
  Then the shooting starts | Sooner or later there has to be a duel
  Whiskey, poker and bullets follow | But the law has other plans
trouble@romance
  Then the war comes between them | But a secret from the past gets in the way
  Of course they hate each other at first | Then it rains, and you know what that means
trouble@space
  Then the oxygen runs out | But the computer has plans of its own | Soon the crew turns on itself
  Meanwhile the aliens are getting closer
trouble@war
  Then winter comes | Not all of them will come home | But the enemy already knows
  Soon they run out of food and ammunition
trouble@family
  Then the snow begins to melt | But an evil hunter is after them
  Lots of songs and chases follow | Along the way they learn what friendship means

kind@horror
  horror movie | horror film | ghost story | slasher | low-budget horror flick
kind@comedy
  comedy | slapstick comedy | farce | family comedy | feel-good comedy
kind@thriller
  thriller | crime movie | whodunit | suspense film | detective story
kind@western
  western | spaghetti western | cowboy movie | revenge western
kind@romance
  love story | romantic comedy | melodrama | tearjerker | romantic drama
kind@space
  sci-fi movie | science fiction film | space opera | B-movie
kind@war
  war movie | war film | World War II drama | war drama
kind@family
  family film | kids' movie | children's film | animated movie | fairy tale
mood_noun@horror
  tension | atmosphere | scares | gore
mood_noun@comedy
  jokes | laughs | gags | slapstick
mood_noun@thriller
  suspense | twists | tension | clues
mood_noun@western
  gunfights | horses | landscapes | showdowns
mood_noun@romance
  chemistry | romance | tears | kisses
mood_noun@space
  special effects | robots | spaceships | ideas
mood_noun@war
  battle scenes | realism | explosions | heroism
mood_noun@family
  songs | animals | magic | adventure

adj+
  amazing | beautiful | brilliant | charming | clever | excellent | fantastic | fascinating
  funny | great | gripping | hilarious | incredible | lovely | magnificent | memorable | moving
  original | outstanding | perfect | powerful | remarkable | stunning | superb | terrific
  touching | unforgettable | well-made | wonderful | top-notch | first-rate | heartwarming
  thought-provoking | absorbing | breathtaking | captivating | delightful | dazzling | elegant
  engaging | enjoyable | entertaining | haunting | honest | inspiring | intelligent | intense
  poetic | refreshing | sharp | spectacular | splendid | subtle | warm | witty
adj-
  annoying | awful | bad | bland | boring | cheap | childish | confusing | disappointing
  dreadful | dull | embarrassing | flat | forgettable | horrible | idiotic | lame | laughable
  lifeless | mediocre | painful | pathetic | pointless | pretentious | predictable | ridiculous
  sloppy | stupid | terrible | tedious | unbearable | unfunny | unoriginal | weak | poorly made
  half-baked | second-rate | amateurish | atrocious | clumsy | cringe-worthy | dumb | empty | fake
  hollow | incoherent | insulting | lazy | messy | mindless | naïve | overrated | overlong | phony
  shallow | silly | stale | tasteless | wooden | worthless | clichéd
very
  really | truly | very | quite | simply | absolutely | SO | just plain
truly
  really | truly | very | rather | genuinely
very_much
  REALLY | really | definitely | definately | honestly | truly | actually
film
  this movie | this film | the movie | the film | "{title}" | {title} | this one
movie
  movie | film | picture | flick
noun+
  masterpiece | gem | classic | little treasure | surprise | delight | must-see | triumph
  joy to watch | breath of fresh air | work of art | winner | knockout
noun-
  mess | disaster | failure | turkey | waste of time | joke | train wreck | insult | bore
  stinker | fiasco | snoozefest | travesty | catastrophe | complete dud
people
  cast | actors | supporting cast | whole ensemble
person
  my wife | my husband | my brother | a friend | my roommate | my girlfriend | my dad
  my daughter | my aunt | my neighbor | my best friend | my grandmother | my boss | my cousin
  my book club
where
  on late night TV | on DVD | at a film festival | in the theater | on cable | on an old VHS tape
  on a plane | at a sneak preview | at the drive-in | at a midnight screening | in an empty cinema
  in a hotel room | at summer camp | on my laptop
when
  last night | yesterday | last weekend | when I was 10 | back in {year} | on a rainy Sunday
  years ago
few
  two | three | four | five | six | a dozen
count
  100 | 12 | 1,000 | 15 | 20 | 40
minute
  5 | 10 | 15 | 20 | 30 | 45

opening+
  This movie is {very} {adj}.
  This movie is a {noun}, plain and simple.
  This movie is one of the most {adj} films I have ever seen!
  This movie is {adj}, {adj} and {adj}... what more could you want?
  This movie is what a {kind} should be: {adj} and {adj}.
  This movie is about {hero}, a {job} who {goal}, and it's {very} {adj}.
  This film is a {noun}.
  This is a {truly} {adj} {kind}.
  This is the best {kind} of the {decade}, if you ask me.
  I loved {film}.
  I loved {film}!!! It's {very} {adj}.
  I loved every minute of "{title}" ({year}).
  I loved this {kind} from the first scene to the last.
  I saw {film} {where} {when}, and I loved it.
  I saw {film} {when} and I still think about it.
  I rented {film} with {person}, and we both loved it.
  I didn't expect much from a {kind}, but {film} is {very} {adj}.
  I've seen {film} at least {few} times, and it never gets old.
  What a {adj} {movie}!
  What a {noun}! I can't believe that so few people know {film}.
  WOW! What a {adj} {kind}.
  "{title}" is a {adj} {kind} with a {adj} cast.
  "{title}" is {director}'s best work, and that says a lot.
  "{title}" may not be well-known, but it's a {noun}.
  {director} has made a {truly} {adj} {movie}.
  If you like a good {kind}, you will love {film}.
  One of the best {movie}s of {year}, no question.
  Finally, a {kind} with a brain and a heart.
  Why is {film} rated so low here? It's {adj}!
  The plot of {film} sounds simple, but the result is {very} {adj}.
  The acting was {adj}, the story was {adj}, and I was never bored.
  Forget the critics: {film} is {adj}.
  My favorite {kind} of all time. Period.
opening-
  This movie is {very} {adj}.
  This movie is a {noun} from start to finish.
  This movie is one of the most {adj} films I have ever seen!
  This movie is {adj}, {adj} and {adj}... need I say more?
  This movie is not a {kind}, it's a {noun}.
  This movie is about {hero}, a {job} who {goal}, and it's {very} {adj}.
  This film is a {noun}.
  This is a {truly} {adj} {kind}.
  This is the worst {kind} of the {decade}, if you ask me.
  I hated {film}.
  I hated {film}!!! It's {very} {adj}.
  I wanted to like "{title}" ({year}), I {very_much} did.
  I loved the book, but {film} is {very} {adj}.
  I loved {director}'s other films, so {film} was a big disappointment.
  I saw {film} {where} {when}, and I want my money back.
  I saw {film} {when} and I am still angry.
  I rented {film} with {person}, and we both fell asleep.
  I expected a good {kind}, but {film} is {very} {adj}.
  I turned {film} off after {minute} minutes.
  What a {adj} {movie}!
  What a waste of time!
  What a waste of {resource}. {film} is {very} {adj}.
  What a waste of a {adj+} cast.
  Oh dear... what a {noun}.
  UGH! What a {adj} {kind}.
  "{title}" is a {adj} {kind} with a {adj} script.
  "{title}" is {director}'s worst work, and that says a lot.
  {director} has made a {truly} {adj} {movie}.
  If you like a good {kind}, stay away from {film}.
  One of the worst {movie}s of {year}, no question.
  How did {film} ever get made?
  Why is {film} rated so high here? It's {adj}!
  The plot of {film} sounds interesting, but the result is {very} {adj}.
  The acting was {adj}, the story was {adj}, and I was bored to tears.
  Don't believe the critics: {film} is {adj}.
  Avoid {film} at all costs!
  What a waste of {resource}!
  What a waste of {resource} this {kind} is.
resource
  talent | money | film | two hours | {minutes} minutes | a good idea | a decent budget
decade
  year | decade | 1970s | 1980s | '90s | century

premise
  The story is about {hero} ({lead}), a {job} who {goal}.
  The plot: {hero}, a {job}, {goal}. {trouble}.
  The plot is simple: {hero} is a {job} who {goal}.
  {lead} plays {hero}, a {job} who {goal}. {trouble}.
  {lead} stars as {hero}, a {job} who {goal}.
  {hero} ({lead}) is a {job} who {goal}. {trouble}...
  It tells the story of {hero}, a {job} who {goal}.
  In {film}, a {job} named {hero} {goal}. {trouble}.
  Set in {place}, it follows {hero}, a {job} who {goal}.
  For those who haven't seen it: {hero} ({lead}) {goal}. {trouble}.
  {lead} is {hero}, a {job} who {goal}, and {costar} plays {his} best friend.
  We meet {hero}, a {job} from {place}, who {goal}.
  (Mild spoilers!) {hero}, played by {lead}, {goal}. {trouble}.
  *** SPOILERS *** {hero} {goal}, and in the end {he} {fate}.
  As the movie opens, {hero} {goal}. {trouble}.
fate
  dies | survives | goes home | loses everything | finds peace | gets {his} revenge | wakes up
  forgives {his} father | walks away alone

comment
  {acting} | {story} | {directing} | {sound} | {look} | {dialogue} | {pace} | {ending} | {moment}
  {effect} | {compare} | {watching} | {opinion} | {character} | {question} | {flavour} | {combo}
  {aside} {acting} | {aside} {story} | {aside} {directing} | {aside} {sound} | {aside} {look}
  {aside} {pace} | {aside} {ending} | {aside} {moment} | {aside} {effect} | {aside} {character}
  {aside} {opinion} | {aside} {watching} | {aside} {combo} | {aside} {flavour}
  {flavour} | {flavour} | {flavour}
aside
  also, | besides, | frankly, | in my opinion, | to be honest, | of course, | by the way, | and
  needless to say, | then again, | in fact, | on top of that, | again, | as I said, | furthermore,
  well, | believe it or not, | in short, | strangely enough, | all jokes aside, | oh, and
combo
  {clause}, {clause}, and {clause}.
  {clause} and {clause}.
  {clause}, and {clause}!
  {clause}; {clause}.
  {clause} (and {clause}).
  {clause}, {clause}... you get the idea.
  {clause} -- and {clause}.
  considering that it's a {kind}, {clause}.
  as far as {kind_plural} go, {clause}.
  from the first scene {clause}, and by the end {clause}.
  even {person} said that {clause}.
clause
  the {part} is {adj} | the {part} is {adverb} {adj} | the {part} was {adj}
  the {part} was {adverb} {adj} | the {part} and the {part} are {adj}
  the {part} felt {adverb} {adj} | {lead} is {adverb} {adj} | {costar} looks {adverb} {adj}
  {director_last}'s {part} is {adverb} {adj} | the film's {part} is {adj}
  this movie's {part} is {adverb} {adj} | I found the {part} {adverb} {adj} | the acting was {adj}
  the acting was {adverb} {adj} | the plot was {adverb} {adj}
part
  acting | plot | story | script | music | camera work | direction | ending | editing | dialogue
  score | casting | costume design | lighting | pacing | opening | title song | choreography
  humor | photography | narration | set design | first act | final showdown | sound design
  premise | finale | love scene | background music | supporting cast | screenplay | voice-over
  prologue | chase sequence
adverb+
  surprisingly | wonderfully | incredibly | consistently | delightfully | strangely | wildly
  quietly | genuinely | refreshingly
adverb-
  painfully | hopelessly | incredibly | consistently | shockingly | strangely | utterly
  embarrassingly | unbelievably | completely

acting+
  the acting was {adj}, especially {lead} as {hero}.
  the acting was {very} {adj}, and {costar} was {adj}.
  the acting was {adj} all around. Even the small parts were {adj}.
  the acting is {adj}, and {lead} should have won an award.
  {lead} is {adj} as {hero}, and {costar} is just as {adj}.
  {lead} gives a {adj} performance, the best of {his} career.
  {lead} and {costar} have {adj} chemistry.
  {lead} was born to play {hero}. You can see it in {his} eyes.
  I loved {lead} as {hero}. {he} is {very} {adj}.
  I loved {costar} in the role of {his2} life.
  the {people} did a {adj} job.
  {costar} steals every scene {he2} is in.
  Has {lead_last} ever been better? I don't think so.
acting-
  the acting was {adj}, especially {lead} as {hero}.
  the acting was {very} {adj}, and {costar} was even worse.
  the acting was {adj} all around. Even the extras were {adj}.
  the acting is {adj}, as if everyone read the lines from a card.
  {lead} is {adj} as {hero}, and {costar} is just as {adj}.
  {lead} gives a {adj} performance, the worst of {his} career.
  {lead} and {costar} have no chemistry at all.
  {lead} has one facial expression, and {he} wears it for {minutes} minutes.
  I usually like {lead}, but here {he} is {adj}.
  I felt sorry for {costar}, who deserves better than this.
  the {people} did a {adj} job.
  {costar} can't act. There, I said it.
  Did {lead_last} lose a bet? {he} looks bored in every scene.
story+
  the plot is {adj} and full of surprises.
  the plot was {adj}, and I didn't see the twist coming.
  the plot keeps you guessing until the last {minute} minutes.
  the plot isn't new, but it's told in a {adj} way.
  the story is {adj} without being too sentimental.
  the story starts slowly, but after {minute} minutes you can't look away.
  the script by {writer} is {adj} and {adj}.
  I loved the way the story comes together.
  the plot has enough {mood_noun} for {few} movies.
  you get a lot of {mood_noun} here, and nothing feels {adj-}.
story-
  the plot is {adj} and full of holes.
  the plot was {adj}, and I saw the twist coming after {minute} minutes.
  the plot makes no sense at all.
  the plot is one big cliché after another.
  the plot was stolen from a much better {movie}.
  the story is {adj}, and nobody seems to care.
  the story goes nowhere... slowly.
  the script by {writer} is {adj} and {adj}.
  there is no plot, just {mood_noun} without any reason.
  you won't find enough {mood_noun} here for a {minute}-minute short.
  it's as if the script was written in {few} days (and it probably was).
directing+
  the direction by {director} is {adj}.
  {director} knows exactly what this movie's audience wants.
  {director} directs with a {adj} eye for detail.
  you can tell that {director} loves this genre.
  {director_last}'s direction is {adj}, never showy.
  for a first-time director, {director} does a {adj} job.
  {director} made {film} for almost no money, and it looks {adj}.
directing-
  the direction by {director} is {adj}.
  {director} doesn't have a clue how to make a {kind}.
  {director} should go back to film school.
  {director_last}'s direction is {adj}, and the editing is worse.
  you can tell that {director} didn't care.
  {director} wastes a budget of ${count} million on {mood_noun}.
  somebody please take the camera away from {director}!
sound+
  the music is {adj}, and I bought the soundtrack the next day.
  the score by {writer} is {adj}.
  the soundtrack was {adj} and fits the mood.
  the music alone is worth the price of the ticket.
  I loved the songs, and I'm still humming them.
sound-
  the music is {adj}, and it never stops.
  the score by {writer} is {adj}.
  the soundtrack was so loud that you couldn't hear the dialogue (maybe that was a good thing).
  the music sounds like it came from a {adj} video game.
  whoever picked the songs must be deaf.
look+
  the cinematography is {adj}, and {place} has never looked better.
  the special effects were {adj} for {year}.
  the costumes and the sets are {adj}.
  the camera work is {adj}, especially at night.
  every shot of {place} looks like a painting.
  visually it's {adj}: the colors, the light, the faces.
  the locations around {place} are {adj}.
look-
  the cinematography is {adj}, and everything looks brown.
  the special effects were {adj}, even for {year}.
  the costumes and the sets look like a {adj} school play.
  the camera shakes so much that I got a headache.
  it's supposed to be {place}, but it was obviously shot in a parking lot.
  the lighting is so dark that you can't see who is who.
  the editing is {adj}, and you can see the microphone in {few} scenes.
dialogue+
  The dialogue is {adj}, with some {adj} one-liners.
  The dialogue is {adj} and sounds like real people talking.
  The line "{quote}" will stay with me forever.
  My favorite line: "{quote}"
  When {hero} says "{quote}", you can't help but smile.
dialogue-
  The dialogue is {adj}, and the jokes fall flat.
  The dialogue is {adj}. Nobody talks like that!
  The line "{quote}" is supposed to be serious. I'm not kidding.
  Worst line ever: "{quote}"
  When {hero} says "{quote}", the whole theater groaned.
quote
  I'm not afraid of the dark anymore. | You can't bury the truth. | Nobody leaves before dessert!
  Love is a train that's always late. | Tell my mother I tried. | We were never here.
  Is that your hand or mine? | It's only money. | Run, you fool! | There is no tomorrow.
  I don't need a doctor, I need a drink. | Somebody has to feed the horses.
  Don't shoot the piano player! | I've been dead before. | My heart isn't for sale.
  You call that a sandwich? | The moon doesn't answer letters. | Where's the money, Frank?
  Every road ends somewhere. | I'd rather be lucky than smart. | Tomorrow we dance.
  Put down the spoon!
pace+
  at {minutes} minutes, it's never too long.
  the pace is {adj}, and the {minutes} minutes fly by.
  it never gets boring, not even for a second.
  it's slow at times, but that's part of the charm.
  it moves fast and doesn't waste a single scene.
  the first {minute} minutes are a bit slow, then it takes off like a rocket.
  I could have watched another {minute} minutes.
pace-
  at {minutes} minutes, it's at least {minute} minutes too long.
  the pace is {adj}. I looked at my watch {few} times.
  it drags, and drags, and drags...
  the first {minute} minutes are OK, but then it falls apart.
  nothing happens for {minutes} minutes. NOTHING!
  the first {minute} minutes feel like {few} hours.
  I've seen glaciers that move faster.
ending+
  the ending is {adj}, and I cried like a baby.
  the ending was {adj}. I won't spoil it for you.
  the last scene is {adj} and stays with you for days.
  the ending took me by surprise, and I loved it.
  And that final shot of {hero}... {adj}!
ending-
  the ending is {adj}, and it comes out of nowhere.
  the ending was so {adj} that people laughed.
  the last scene is {adj} and explains nothing.
  the ending? {hero} wakes up, and it was all a dream. Give me a break!
  I was rooting for the {villain} in the end.
villain
  bad guys | shark | villain | killer | credits | other side | mosquitoes | furniture | avalanche
  tax collector | wolves
moment+
  the scene where {hero} {event} is {very} {adj}.
  I loved the scene where {hero} {event}.
  there's a {adj} moment when {hero} {event}.
  my favorite part is when {hero} {event} (you'll know it when you see it).
moment-
  the scene where {hero} {event} is {very} {adj}.
  I laughed out loud when {hero} {event}, and it wasn't meant to be funny.
  there's an endless scene in which {hero} {event}.
  at one point {hero} {event} for no reason whatsoever.
event
  {event_genre} | {event_genre} | dances alone in the kitchen
  talks to {his} father for the last time | drives through the rain
  sings in front of the whole town | meets {costar_role} | says goodbye to {costar_role}
  writes a farewell note | breaks a window with {his} fist | plays the piano | steals a motorcycle
  forgets the password | lights a cigar | feeds the pigeons | shaves {his} head
  climbs the clock tower | eats a whole pizza
costar_role
  the old teacher | the mayor | {his} sister | the blind man | the twins | the stranger at the bar
  the landlady | the fortune teller | the priest | the ice cream man | the professor
  the librarian | the widow
event_genre@horror
  opens the coffin | runs upstairs with a candle | looks into the mirror | fights the creature
event_genre@comedy
  falls into the wedding cake | hides in the closet | loses {his} pants | fights a goose
event_genre@thriller
  opens the briefcase | chases the killer over the roofs | breaks into the vault | finds the tape
event_genre@western
  draws first | rides into the sunset | burns down the saloon | buries {his} horse
event_genre@romance
  burns the letters | runs through the airport | kisses the wrong person | dances the last waltz
event_genre@space
  opens the airlock | unplugs the computer | meets the alien queen | floats away from the ship
event_genre@war
  reads the letter from home | crosses the minefield | shares {his} last cigarette
  jumps off the bridge
event_genre@family
  learns to fly | lets the animal go | talks to the moon | rides on a whale
effect+
  it has everything: {mood_noun}, {mood_noun} and a lot of heart.
  it's worth watching for the {mood_noun} alone.
  if you want {mood_noun}, you've come to the right place.
  you get plenty of {mood_noun}, but it's the people you remember.
effect-
  it has nothing: no {mood_noun}, no {mood_noun} and no heart.
  a {kind} without {mood_noun} is like soup without salt.
  if you want {mood_noun}, look somewhere else.
  all the {mood_noun} in the world couldn't save it.
compare+
  it's much better than "{other_title}".
  it reminded me of "{other_title}", but {film} is more {adj}.
  unlike most {kind_plural}, it treats the audience like adults.
  they don't make {kind_plural} like this anymore.
  Hollywood could learn a thing or two from {film}.
compare-
  it makes "{other_title}" look like a masterpiece.
  it's a cheap rip-off of "{other_title}".
  like most {kind_plural} of the time, it's {adj} and {adj}.
  I have seen school plays that were better than this.
  Hollywood, please stop making {kind_plural} like this.
kind_plural@horror
  horror movies | slashers | ghost stories
kind_plural@comedy
  comedies | farces
kind_plural@thriller
  thrillers | crime movies
kind_plural@western
  westerns | cowboy movies
kind_plural@romance
  love stories | romantic comedies
kind_plural@space
  sci-fi movies | space operas
kind_plural@war
  war movies | war dramas
kind_plural@family
  kids' movies | family films
watching+
  I watched it with {person}, and we laughed and cried.
  my kids (ages {age} and {age}) loved it.
  the whole audience clapped at the end.
  I stayed up until three in the morning to finish it, and it was worth it.
  I bought the DVD for $5, and it's the best money I ever spent.
  {person} recommended it to me, and now I owe them a beer.
  I've shown it to {person} and to {person}, and they both asked for more.
  we paused it {few} times because we were laughing so hard.
  I had tears in my eyes, and {person} pretended not to.
watching-
  I watched it with {person}, who will never forgive me.
  my kids (ages {age} and {age}) were bored after {minute} minutes.
  half of the audience walked out.
  I paid $9 for this?! I want a refund.
  I only kept watching because {person} had fallen asleep on the remote.
  {person} recommended it to me, and we're no longer speaking.
  I've shown it to {person} as a punishment.
  we paused it {few} times to make sure that the DVD wasn't broken.
  I had a headache, and {person} left to wash the car.
age
  4 | 6 | 8 | 9 | 11 | 13
opinion+
  I {very_much} enjoyed it.
  it isn't perfect, but it's {adj} and {adj}.
  I was {very} surprised by how {adj} it was.
  I can't say enough good things about {film}.
  it made me laugh, it made me cry, it made me think.
  it's {adj}, it's {adj}, it's... well, just see it.
  that's what movies are for.
  some people say it's {adj-}. They're wrong.
  This movie is a lot of fun, and it knows it.
  there's something {adj} about it that I can't explain.
  it's the kind of {movie} that grows on you.
  the more I think about it, the more {adj} it seems.
  call me old-fashioned, but this is how a {kind} should be made.
  it's not just {adj}, it's {adj}.
  I loved the {part}, the {part} and above all the {part}.
opinion-
  I {very_much} tried to enjoy it, but I couldn't.
  it isn't scary, it isn't funny, it isn't even {adj+}.
  I was {very} shocked by how {adj} it was.
  I can't think of one good thing to say about {film}.
  it made me yawn, it made me angry, it made me leave.
  it's {adj}, it's {adj}, it's... oh, never mind.
  it's an insult to anyone with a brain.
  some people say it's {adj+}. Did we see the same movie?
  This movie is so bad that it's not even good in a so-bad-it's-good way.
  there's nothing {adj+} about it.
  it's the kind of {movie} that gives {kind_plural} a bad name.
  the more I think about it, the more {adj} it seems.
  call me old-fashioned, but a {kind} should have a {part}.
  it's not just {adj}, it's {adj}.
  I hated the {part}, the {part} and above all the {part}.
character+
  the characters are {adj}, and you care about every one of them.
  {hero} is a {adj} character, {trait} and {trait}.
  you feel for {hero}, who is {trait} but never {trait_bad}.
  {hero} and {friend} feel like old friends by the end.
  {hero} starts out {trait_bad} and ends up {trait}, and you believe it.
  {friend} is the {trait} one, and {costar} plays {him2} with a wink.
character-
  the characters are {adj}, and I didn't care about any of them.
  {hero} is a {adj} character, {trait_bad} and {trait_bad}.
  we're told that {hero} is {trait}, but {he} just seems {trait_bad}.
  {hero} and {friend} are as deep as a puddle.
  {hero} starts out {trait_bad} and ends up {trait_bad}.
  {friend} is supposed to be {trait}, but {costar} plays {him2} like a robot.
trait
  brave | shy | stubborn | kind | lonely | honest | gentle | proud | loyal | patient
  warm-hearted | clever | fearless | generous | dreamy | funny
trait_bad
  whiny | selfish | arrogant | wooden | rude | dumb | cold | clueless | cruel | lazy | vain
  grumpy | naïve | spoiled | hysterical
question+
  Who knew that {director_last} could make a {adj} {kind}?
  Why isn't {film} on DVD yet?
  Where has {costar} been all these years?
  Is it deep? Not really. Is it {adj}? YES!
  Will you laugh? Probably. Will you cry? Definitely.
  What's not to like about {lead} and {costar} in the same {movie}?
  How did {director_last} do it? I have no idea, but it works.
  Remember when {kind_plural} were {adj}? I do, thanks to {film}.
  Would I see it again? In a heartbeat.
  Did anybody else notice {hero}'s {wear} in the last scene? Lovely detail.
question-
  Who thought that {film} was a good idea?
  Why does {hero} never call the police?
  Where did the ${count} million go? Not into the {mood_noun}, that's for sure.
  Is it {adj+}? No. Is it {adj}? YES!
  Will you laugh? No. Will you cry? Only about the ticket price.
  What's the point of having {lead} and {costar} in the same {movie}?
  How did {director_last} get the money? Blackmail?
  Remember when {kind_plural} were {adj+}? Neither does {director_last}.
  Would I see it again? Over my dead body.
  Did anybody else notice that {hero}'s {wear} changes color in every scene?
wear
  scarf | hat | necklace | mustache | boots | raincoat | eyepatch | wristwatch | gloves
flavour@horror+
  this is the kind of {kind} that makes you check under the bed.
  the {scary} in the {dark_place} made me jump out of my seat.
  no cheap scares here, just slow {dread} and a {scary} you never quite see.
  I slept with the lights on for {few} nights.
  the {scary} made me spill my popcorn, and I'm not easily scared.
flavour@horror-
  the {scary} is a guy in a rubber suit.
  the {scary} in the {dark_place} wouldn't frighten a kitten.
  it's about as scary as a {soft_thing}.
  the blood looks like ketchup, and the {scary} looks like my uncle.
  there's no {dread} at all, just teenagers running through a {dark_place}.
scary
  creature | apparition | scarecrow | corpse | shadow | hooded figure | puppet | severed hand
  bat
dark_place
  basement | attic | graveyard | tunnel | fog | forest | swamp | chapel | corridor
dread
  dread | menace | unease | terror | paranoia
soft_thing
  bowl of oatmeal | teddy bear | wet sock | garden gnome | loaf of bread
flavour@comedy+
  I laughed so hard that I {laugh_result}.
  the gag with the {prop} is pure genius.
  the jokes come fast, and the timing is perfect.
  it's silly, yes, but it's never mean.
  who would have thought that a {prop} could be so funny?
flavour@comedy-
  I laughed once, and that was at the {prop}.
  the gag with the {prop} is repeated {few} times. {few} times!
  the jokes were old when my grandfather was young.
  it thinks that shouting is the same as being funny.
  a {prop} would have had better comic timing.
laugh_result
  fell off the couch | cried | missed half of the lines | spilled my soda | woke up the neighbors
prop
  rubber chicken | revolving door | trombone | toupee | chandelier | bagpipe | shopping cart
  lobster
flavour@thriller+
  you'll bite your nails for the last {minute} minutes.
  every {evidence} matters, so pay attention.
  I suspected the {suspect} first, then the {suspect}, and I was wrong both times.
  it's a cat-and-mouse game of the highest order.
  the interrogation in the {crime_place} is a lesson in suspense.
flavour@thriller-
  I knew that it was the {suspect} as soon as I saw the {evidence}.
  a {evidence} appears out of thin air, and the case is solved. Really?
  the so-called detective misses every {evidence} in the {crime_place}.
  it's supposed to be a mystery, but the only mystery is who paid for it.
  the chase through the {crime_place} goes on forever.
evidence
  fingerprint | receipt | bullet hole | footprint | ticket stub | lipstick stain | wiretap
  passport
suspect
  butler | gardener | chauffeur | widow | banker | ambassador | psychiatrist | nephew
crime_place
  warehouse | subway | courthouse | embassy | casino | harbor | elevator
flavour@western+
  dust, sweat and {western_thing}: this is the real West.
  the final duel at the {western_place} is as tense as they come.
  it has a {western_thing}, a {western_thing} and not one wasted word.
  they ride out of the {western_place} at dawn, and your heart rides with them.
  {hero} hardly speaks, but {his} eyes say it all.
flavour@western-
  the cowboys look like they came straight from the hairdresser.
  I counted {few} {western_thing}s and no story.
  the duel at the {western_place} is over before it begins.
  the horses out-act the {people}.
  you can see a telephone pole behind the {western_place}. In 1870!
western_thing
  six-shooter | whiskey bottle | tumbleweed | rattlesnake | harmonica | lasso | poncho | campfire
western_place
  corral | railroad station | gold mine | waterhole | trading post | church tower | ranch
flavour@romance+
  the kiss {romance_place} gave me goosebumps.
  they dance, they quarrel, they share a {sweet}, and you believe every second.
  keep a box of tissues and a {sweet} within reach.
  it's about second chances, and it's never corny.
  it made me want to call my first love.
flavour@romance-
  the kiss {romance_place} has all the passion of a tax form.
  they have known each other for {minute} minutes, and they're already engaged?
  it's so sweet that my teeth hurt, like eating {count} {sweet}s.
  it's pure soap opera, with violins.
  the lovers quarrel about a {sweet}. For half an hour!
romance_place
  on the bridge | in the rain | under the chestnut trees | at the carousel | on the rooftop
  behind the bakery | in the lighthouse
sweet
  milkshake | croissant | chocolate cake | lemon tart | wedding cookie | peppermint
flavour@space+
  the {gadget} still looks futuristic today.
  it asks what makes us human, and it has a {gadget} too.
  the silence outside the {ship_part} is more frightening than any monster.
  the model of the {ship_part} is a work of art.
  science teachers may complain about the {gadget}, but I was hooked.
flavour@space-
  the {gadget} is obviously a painted {kitchen_thing}.
  the spaceship wobbles, and the aliens have zippers.
  there is gravity in the {ship_part} but not in the {ship_part}. Explain that!
  they talk about quantum this and quantum that, and it's all nonsense.
  the {ship_part} is made of cardboard and a {kitchen_thing}.
gadget
  laser | hologram | jetpack | space suit | escape pod | cloning machine | translator | radar
ship_part
  airlock | cockpit | engine room | docking bay | greenhouse | bridge | cargo hold
kitchen_thing
  toaster | hair dryer | frying pan | vacuum cleaner | egg carton | colander
flavour@war+
  it shows the {war_thing} and the fear without any flag-waving.
  my grandfather was there, and he said that the {war_thing} was exactly like that.
  no speeches, no heroes, just tired boys in the {war_place}.
  the silence after the attack on the {war_place} is devastating.
  you can almost smell the {war_thing}.
flavour@war-
  it turns the war into a video game, with a clean {war_thing} for everybody.
  the uniforms are wrong, the {war_thing} is wrong, and the history is wrong.
  the attack on the {war_place} looks like {few} men in a field.
  it's two hours of flag-waving and shouting.
  the enemy can't hit a barn, even when it's in the {war_place}.
war_thing
  mud | rifle | smoke | hunger | helmet | boredom | homesickness | barbed wire
war_place
  trenches | village | fortress | beach | ruins | airfield | snow | supply depot
flavour@family+
  the {animal} is adorable, and kids will want one.
  grown-ups will enjoy the {animal} as much as the little ones.
  the colors are bright, the songs are catchy, and the {animal} talks!
  it teaches a lesson about {virtue} without preaching.
  our whole family sang along with the {animal}.
flavour@family-
  the {animal} is annoying, and I never want to hear that song again.
  kids deserve better than a {animal} that burps.
  it preaches about {virtue} until you want to scream.
  the animation is stiff, and the {animal} looks like a potato.
  my nephew asked if the {animal} could please be quiet.
animal
  squirrel | hedgehog | otter | elephant | hamster | parrot | turtle | reindeer | kangaroo
virtue
  sharing | patience | courage | honesty | growing up | forgiveness

mixed+
  My only complaint: the {weak_spot} is a bit {adj-}.
  OK, the {weak_spot} could have been better, but who cares?
  It's not for everyone, and the {weak_spot} is {adj-}.
  The {weak_spot} isn't great, but the rest makes up for it.
mixed-
  The only good thing is the {weak_spot}, which is {adj+}.
  To be fair, the {weak_spot} was {adj+}.
  It's not all bad: the {weak_spot} is {adj+}.
  {costar} is {adj+}, but one good actor can't save it.
weak_spot
  music | ending | middle part | title | subplot with {friend} | makeup | dubbing | first half
  editing

closing+
  I highly recommend {film}. {score}
  Highly recommended! {score}
  Go and see it. {score}
  Don't miss it! {score}
  If you get a chance to see it, DO! {score}
  See it with someone you love. {score}
  All in all, a {truly} {adj} {movie}. {score}
  Overall, {film} is a {adj} {kind}. {score}
  A {noun}! {score}
  Two thumbs up. {score}
  I'll watch it again and again. {score}
  I give it {rating} out of 10.
  I give {film} a {rating}/10, and it deserves every point.
  Thank you, {director}! {score}
  Bring some tissues... {score}
  A must for fans of {lead}. {score}
  So pour a glass of wine, dim the lights and enjoy. {score}
  This movie is proof that {kind_plural} aren't dead yet. {score}
  I loved it then, and I love it now. {score}
  Buy it, rent it, borrow it, but see it. {score}
  Hats off to the {people}! {score}
  If you don't like it, check your pulse. {score}
  I hope that {director_last} makes a sequel.
closing-
  I don't recommend {film}. {score}
  Not recommended. {score}
  Do yourself a favor and skip it. {score}
  Stay away! {score}
  DO NOT waste your time. {score}
  Save your money. {score}
  All in all, a {truly} {adj} {movie}. {score}
  Overall, {film} is a {adj} {kind}. {score}
  A {noun}! {score}
  Two thumbs down. {score}
  I'll never get those {minutes} minutes back. {score}
  I give it {rating} out of 10, and that's being generous.
  I give {film} a {rating}/10, mostly for the {weak_spot}.
  Shame on you, {director}! {score}
  Go read a book instead... {score}
  Only for die-hard fans of {lead}. {score}
  Wash your dishes instead, it's more exciting. {score}
  This movie is proof that anybody can direct. {score}
  I loved the popcorn, though. {score}
  Burn it, bury it, forget it. {score}
  The {people} should be ashamed. {score}
  You have been warned! {score}
  I pray that {director_last} doesn't make a sequel.
  What a waste of {resource}. {score}
score
  {rating}/10 | {rating}/10. | {rating} out of 10. | Rating: {rating}/10.
  My rating: {rating} out of 10. | (I gave it a {rating}.) | Final score: {rating}/10
  My vote is {rating}. | {rating} of 10 stars.

writer
  {first_man} {last_name} | {first_woman} {last_name}
other_title
  The {t_adj} {t_noun} | {t_verb} the {t_noun} | The Last {t_noun} | {t_verb} {place}
"""


def read_grammar(text: str) -> dict[str, list[str]]:
    """The rules of the grammar: the options of each name."""
    rules: dict[str, list[str]] = {}
    options: list[str] = []
    for line in filter(None, text.splitlines()):
        if line.startswith(" "):
            options += line.strip().split(" | ")
        else:
            options = rules[line] = []
    return rules


RULES = read_grammar(GRAMMAR)


def pick(options: Sequence[T], rng: random.Random) -> T:
    """One of the options, each as likely as the others."""
    return options[int(rng.random() * len(options))]


def expand(text: str, facts: Facts, used: set[str], rng: random.Random) -> str:
    """Replace each {name} in `text`; an option in `used` comes again only when none is left."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name in facts:
            return facts[name]
        genre, mood = facts["genre"], facts["mood"]
        keys = (f"{name}@{genre}{mood}", name + mood, f"{name}@{genre}", name)
        options = next(RULES[key] for key in keys if key in RULES)
        choice = pick([option for option in options if option not in used] or options, rng)
        used.add(choice)
        return expand(choice, facts, used, rng)

    return re.sub(r"{([\w+-]+)}", fill, text)


def polish(text: str) -> str:
    """Put capitals at the beginnings of sentences, and `an` where `a` stands before a vowel."""
    text = re.sub(r"(?i)\b(a) (?=[aei8]|o(?!ne\b)|u(?!ni))", r"\1n ", text)
    return re.sub(r"(^|[^.][.!?]\W? |/>)([a-z])", lambda match: match[1] + match[2].upper(), text)


def invent_film(rng: random.Random) -> Facts:
    """Everything that all reviews of one film agree on."""
    facts = {"mood": "", "genre": pick(RULES["genre"], rng)}
    facts["year"] = str(1948 + int(rng.random() * 60))
    facts["minutes"] = str(75 + int(rng.random() * 80))
    used: set[str] = set()
    for hero, actor, suffix in (("hero", "lead", ""), ("friend", "costar", "2")):
        gender = pick(("man", "woman"), rng)
        facts |= {word + suffix: form for word, form in PRONOUNS[gender].items()}
        facts[hero] = expand(f"{{first_{gender}}}", facts, used, rng)
        facts[actor] = expand(f"{{first_{gender}}} {{last_name}}", facts, used, rng)
    for name in ("director", "place", "job", "goal", "trouble", "title"):
        facts[name] = expand(f"{{{name}}}", facts, used, rng)
    for name in ("lead", "director"):
        facts[name + "_last"] = facts[name].split()[-1]
    return facts


def write_review(film: Facts, rating: int, rng: random.Random) -> str:
    """One review of 40 to 140 words, its sentiment that of the rating (1 to 10)."""
    facts = film | {"mood": "+" if rating > 5 else "-", "rating": str(rating)}
    used: set[str] = set()
    length = 38 + int(rng.random() * 52)
    parts = pick(RULES["shape"], rng).split()
    text = ""
    while parts or len(text.split()) < length:
        text += expand(f"{{{parts.pop(0) if parts else 'comment'}}}", facts, used, rng)
        text += pick(BREAKS, rng)
    # Only the middling ratings see the other side.
    end = "{mixed} {closing}" if rating in (3, 4, 7, 8) else "{closing}"
    return polish(text + expand(end, facts, used, rng))


def invent_corpus() -> dict[str, str]:
    """The text of every member by its path; a folder's path ends with a slash."""
    rng = random.Random(SEED)
    films = [invent_film(rng) for _ in range(FILMS)]
    members = {"aclImdb/": "", "aclImdb/README": README}
    # No film is in both splits, as in the real archive.
    halves = {"train": range(FILMS // 2), "test": range(FILMS // 2, FILMS)}
    for split, label, ratings, reviews in FOLDERS:
        folder = f"aclImdb/{split}/"
        members |= {folder: "", f"{folder}{label}/": ""}
        urls = ""
        for number in range(reviews):
            film, rating = pick(halves[split], rng), pick(ratings, rng)
            name = f"{number}_{0 if label == 'unsup' else rating}.txt"
            members[f"{folder}{label}/{name}"] = write_review(films[film], rating, rng)
            urls += f"http://www.example.com/title/tt{film:07}/usercomments\n"
        members[f"{folder}urls_{label}.txt"] = urls
    return members | count_words(labelled(members))


def labelled(members: dict[str, str]) -> dict[str, str]:
    """The members that are reviews with a label."""
    return {path: text for path, text in members.items() if re.search(r"/(pos|neg)/\d", path)}


def count_words(reviews: dict[str, str]) -> dict[str, str]:
    """The archive's word lists: the words, their mean ratings, and the first bags of words."""
    counts: Counter[str] = Counter()
    ratings: Counter[str] = Counter()
    bags: dict[str, list[tuple[int, Counter[str]]]] = {"train": [], "test": []}
    for path, text in reviews.items():
        bag = Counter(re.findall(r"[\w'-]+", text.lower()))
        rating = int(path.rpartition("_")[2].removesuffix(".txt"))
        counts.update(bag)
        ratings.update({word: count * rating for word, count in bag.items()})
        bags[path.split("/")[1]].append((rating, bag))
    words = {word: index for index, (word, _) in enumerate(counts.most_common())}
    members = {
        "aclImdb/imdb.vocab": "".join(f"{word}\n" for word in words),
        "aclImdb/imdbEr.txt": "".join(f"{ratings[w] / counts[w] - 5.5:.4f}\n" for w in words),
    }
    for split, lines in bags.items():
        feat = ""
        for rating, bag in lines[:BAG_OF_WORDS_LINES]:
            indices = sorted((words[word], count) for word, count in bag.items())
            feat += " ".join([str(rating), *(f"{word}:{count}" for word, count in indices)]) + "\n"
        members[f"aclImdb/{split}/labeledBow.feat"] = feat
    return members


def pack(members: dict[str, str]) -> bytes:
    """A tar of the members that holds no trace of when, where or by whom it was made.

    Sorted by path, so `10_8.txt` comes after `100_7.txt` and before `11_9.txt`, as in the real one.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path, text in sorted(members.items()):
            member = tarfile.TarInfo(path)
            if path.endswith("/"):
                member.type, member.mode = tarfile.DIRTYPE, 0o755
            data = text.encode()
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def main() -> None:
    """Write the archive and say what is in it."""
    parser = argparse.ArgumentParser(description="Write the embedded sample corpus.")
    default = Path(__file__).with_name("reviews.tar.gz")
    parser.add_argument("--output", type=Path, default=default, help="default: %(default)s")
    output: Path = parser.parse_args().output
    members = invent_corpus()
    data = gzip.compress(pack(members), compresslevel=9, mtime=0)
    part = output.with_name(output.name + ".part")
    part.write_bytes(data)
    os.replace(part, output)
    reviews = labelled(members)
    words = sum(len(text.split()) for text in reviews.values())
    print(f"{output}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    print(f"{len(reviews)} labelled reviews, {words} words")


if __name__ == "__main__":
    main()
