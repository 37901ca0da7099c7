# SPDX-License-Identifier: Apache-2.0
"""Words of the sentences that the documents are asked about. The splits share none of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pool:
    """Words of one split. Every name and every value occurs in one split only."""

    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    towns: tuple[str, ...]
    roles: tuple[str, ...]
    places: tuple[str, ...]
    things: tuple[str, ...]
    containers: tuple[str, ...]
    goods: tuple[str, ...]
    adjectives: tuple[str, ...]
    animals: tuple[str, ...]
    titles: tuple[str, ...]
    colours: tuple[str, ...]
    first_digits: str


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split(","))


POOLS = {
    "tune": Pool(
        first_names=_words(
            "Maren Tobias Helena Victor Agnes Oliver Clara Martin Rosa Edwin Judith Simon Laura "
            "Peter Nora Arthur"
        ),
        last_names=_words(
            "Oldby Hartwell Lindgren Mercer Castle Novak Fairley Winter Brennan Holt Salter Quincy "
            "Marsh Penrose Weaver Drummond"
        ),
        towns=_words(
            "Lisbon Vienna Bristol Oslo Geneva Boston Prague Dublin Naples Krakow Seville Toronto"
        ),
        roles=_words(
            "keeper baker gardener tailor captain teacher carpenter doctor printer shepherd cook "
            "porter clerk sailor"
        ),
        places=_words(
            "lighthouse bakery orchard harbour school archive chapel windmill station theatre "
            "brewery greenhouse quarry stable pharmacy ferry"
        ),
        things=_words(
            "clock carpet piano mirror ladder lantern kettle statue violin curtain telescope "
            "wardrobe anchor saddle"
        ),
        containers=_words("basket chest drawer cart cupboard sack trunk"),
        goods=_words(
            "apples candles nails ribbons walnuts spoons onions buttons soap pears rope honey "
            "plates needles salt gloves paper cheese matches beans"
        ),
        adjectives=_words("amber silent crooked frozen golden hollow wooden gentle hidden rusty"),
        animals=_words("falcon otter badger salmon rabbit raven tiger lizard spider camel"),
        titles=_phrases(
            "The Market, The Garden, The Voyage, The Winter, The Bridge, The Kitchen, The Workshop,"
            "The Forest, The Letter, The Music, The Railway, The Island"
        ),
        colours=_words("red green white pink brown"),
        first_digits="2468",
    ),
    "test": Pool(
        first_names=_words(
            "Daniel Ingrid Walter Emma Felix Sarah Hugo Anna Leonard Julia Marcus Irene Thomas "
            "Alice Robert Vera"
        ),
        last_names=_words(
            "Ashford Keller Moreau Granger Tanner Bishop Larsen Whitaker Dalton Romano Fisher "
            "Coleman Thorne Beckett Langley Stone"
        ),
        towns=_words(
            "Madrid Zurich Glasgow Warsaw Venice Chicago Athens Munich Porto Hamburg Budapest "
            "Montreal"
        ),
        roles=_words(
            "warden miller librarian painter guard nurse blacksmith surgeon weaver farmer barber "
            "pilot singer butcher"
        ),
        places=_words(
            "castle library vineyard hospital dairy museum monastery sawmill observatory market "
            "tannery factory cellar barn hotel tower"
        ),
        things=_words(
            "bell table painting stove boat lamp bench fountain drum flag compass cabinet plough "
            "helmet"
        ),
        containers=_words("box barrel crate bag shelf wagon locker"),
        goods=_words(
            "lemons brushes hammers shirts almonds knives carrots coins flour plums wire butter "
            "cups scissors pepper boots ink bread lamps peas"
        ),
        adjectives=_words("silver hungry broken burning ancient narrow clever patient noisy dusty"),
        animals=_words("eagle beaver wolf trout donkey parrot panther turtle beetle goose"),
        titles=_phrases(
            "The Fair, The Meadow, The Journey, The Summer, The Road, The Cellar, The Studio,"
            "The River, The Diary, The Dance, The Airport, The Mountain"
        ),
        colours=_words("blue yellow black orange grey"),
        first_digits="3579",
    ),
}
