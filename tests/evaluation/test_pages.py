"""The page of an evaluation."""

from minigpt.evaluation import pages
from minigpt.evaluation.pages import Passage


def test_a_run_is_marked_with_the_words_around_it() -> None:
    words = [f"w{i}" for i in range(60)]
    page = pages.marked(Passage(words, 30, 2)).split()
    assert page[0] == page[-1] == "..."
    assert page[1:-1] == [*words[10:30], "[[", "w30", "w31", "]]", *words[32:52]]
    assert pages.marked(Passage(["a", "b", "c"], 0, 3)) == "[[ a b c ]]"
    assert pages.marked(Passage(["a", "b", "c"], 1, 1)) == "a [[ b ]] c"


def test_runs() -> None:
    assert pages.runs("texts", [1, 2, 6]) == ("texts: median 2, 95th percentile 5.6, longest 6\n")


def test_a_page_says_what_it_knows_only_a_sample_of() -> None:
    whole = {"reviews": 5, "bytes": 50, "all_reviews": 5, "all_bytes": 50}
    part = {"reviews": 1234, "bytes": 10, "all_reviews": 5678, "all_bytes": 99}
    assert pages.sampled({"training": whole, "held_out": whole}) == ""
    assert pages.sampled({"training": part, "held_out": whole}) == (
        "Of the training reviews, the baselines, the charges and the search for copied runs know "
        "a sample: 1,234 of 5,678, 10 of 99 bytes (evaluate.sample_bytes).\n\n"
    )
    assert pages.sampled({"training": part, "held_out": part}).splitlines()[1] == (
        "Of the held-out reviews, the figures are those of a sample: 1,234 of 5,678, 10 of 99 "
        "bytes (evaluate.sample_bytes)."
    )


def test_the_table_of_losses_has_each_model() -> None:
    row = {"loss": 1.0, "perplexity": 2.0, "bits_per_byte": 3.0}
    numbers = {
        **row,
        "known_loss": 4.0,
        "known_perplexity": 5.0,
        "accuracy": 0.5,
        "unk_share": 0.25,
        "charged": {"case": 0.03, "spelling": 0.1},
        "kneser_ney": {**row, "loss": 6.0},
        "mixture": {**row, "loss": 5.5},
        "unigram": {**row, "loss": 7.0},
        "held_out": {"reviews": 1234, "targets": 5678, "bytes": 9},
    }
    page = pages.losses(numbers, 3)
    assert "1,234 reviews, 5,678 targets, 9 bytes" in page
    rows = {
        " ".join(words[:-3]): words[-3:] for words in map(str.split, page.splitlines()) if words
    }
    assert rows["model"] == ["1.0000", "2.00", "3.0000"]
    assert rows["Kneser-Ney 3-gram"][0] == "6.0000"
    assert rows["mean of both"][0] == "5.5000"
    assert rows["unigram"][0] == "7.0000"
    assert "0.1300 are for what the targets leave out (case 0.0300, spelling 0.1000)" in page
