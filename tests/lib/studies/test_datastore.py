# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
from __future__ import annotations

import multiprocessing
import os
import signal
import time

import nibabel as nib
import numpy as np
import pytest

from lib.errors import PatchwiseError
from lib.ledger.queries import QueryLedger
from lib.ledger.records import Asked
from lib.partial_labels import UNLABELLED
from lib.regions import Region
from lib.storage.volumes import ImageError
from lib.studies.datastore import STATE_FOLDER, PartialLabelDatastore

CLASSES = {"anterior": 1, "posterior": 2}
AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])
SHAPE = (12, 10, 8)
INFO = [{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 2}]


def write(path, array, affine=AFFINE, dtype=np.float32):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array.astype(dtype), affine), path)
    return path


def truth():
    label = np.zeros(SHAPE, np.uint8)
    label[2:8, 2:8, 2:6] = 1
    label[4:8, 2:8, 2:6] = 2
    return label


@pytest.fixture
def studies(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "studies" / f"{name}.nii.gz", np.random.default_rng(0).normal(size=SHAPE))
    (tmp_path / "studies" / "._a.nii.gz").write_bytes(b"macOS")
    return tmp_path / "studies"


@pytest.fixture
def store(studies):
    return PartialLabelDatastore(studies, CLASSES, QueryLedger(studies / STATE_FOLDER / "ledger.sqlite"))


def ask(store, start=(0, 0, 0), size=(6, 5, 4), image="a", client="ann", batch=None, minutes=60):
    asked = [Asked(Region(image, start, size), "patch", None, {})]
    (query,) = store.ledger.ask(batch or f"b{start}", "random", 0, asked)
    return store.ledger.leases.lease([query.id], client, minutes)[0]


def submit(store, tmp_path, array, image="a", name="label.nii.gz", affine=AFFINE, **info):
    path = write(tmp_path / "upload" / name, array, affine, np.uint8)
    store.save_label(image, str(path), "final", {"label_info": INFO, "client_id": "ann", **info})
    return final(store, image)


def final(store, image="a"):
    return np.asarray(nib.load(store.get_label_uri(image, "final")).dataobj)


def test_images_are_listed_without_hidden_twins(store):
    assert store.list_images() == ["a", "b"]
    assert store.get_unlabeled_images() == ["a", "b"]
    assert store.status() == {"total": 2, "completed": 0, "label_tags": {}}


def test_only_the_queried_region_becomes_labelled(store, tmp_path):
    query = ask(store)
    label = submit(store, tmp_path, truth(), queries=[query.id])
    assert np.array_equal(label[query.region.slices], truth()[query.region.slices])
    label[query.region.slices] = UNLABELLED
    assert np.all(label == UNLABELLED)
    assert np.allclose(nib.load(store.get_label_uri("a", "final")).affine, AFFINE)
    assert store.get_labeled_images() == ["a"]
    assert store.datalist() == [{"image": store.get_image_uri("a"), "label": store.get_label_uri("a", "final")}]
    assert store.ledger.query(query.id).status == "answered"


def test_without_queries_the_clients_open_regions_are_meant(store, tmp_path):
    mine, other = ask(store), ask(store, (6, 5, 4), client="ben")
    label = submit(store, tmp_path, truth())
    assert np.array_equal(label[mine.region.slices], truth()[mine.region.slices])
    assert np.all(label[other.region.slices] == UNLABELLED)
    label = submit(store, tmp_path, truth(), client_id="ben")
    assert np.array_equal(label[other.region.slices], truth()[other.region.slices])


def test_a_late_answer_is_taken_unless_somebody_else_gave_it(store, tmp_path):
    query = ask(store, minutes=1e-9)
    time.sleep(0.01)
    store.ledger.leases.expire()
    label = submit(store, tmp_path, truth())
    assert np.array_equal(label[query.region.slices], truth()[query.region.slices])


def test_a_client_without_a_region_is_told_what_to_do(store, tmp_path):
    ask(store, client="ben")
    with pytest.raises(PatchwiseError, match="ann has no open region on a; ask for the next region") as refused:
        submit(store, tmp_path, truth())
    assert refused.value.status == 400
    assert store.get_labeled_images() == []
    assert store.ledger.answers.of_image("a") == []


def test_an_image_nobody_was_asked_about_is_taken_whole(store, tmp_path):
    assert np.array_equal(submit(store, tmp_path, truth()), truth())


def test_whole_true_takes_all_of_an_image_that_was_asked_about(store, tmp_path):
    ask(store)
    assert np.array_equal(submit(store, tmp_path, truth(), whole=True), truth())


def test_classes_are_matched_by_name(store, tmp_path):
    swapped = np.choose(truth(), [0, 2, 1]).astype(np.uint8)
    info = [{"name": "Posterior", "idx": 1}, {"name": "Anterior", "idx": 2}]
    assert np.array_equal(submit(store, tmp_path, swapped, label_info=info), truth())


def test_a_second_submission_keeps_both_raw_files_and_the_newest_wins(store, tmp_path):
    query = ask(store)
    submit(store, tmp_path, np.zeros(SHAPE, np.uint8), queries=[query.id])
    label = submit(store, tmp_path, truth())
    assert np.array_equal(label[query.region.slices], truth()[query.region.slices])
    assert len(list((store.studies / STATE_FOLDER / "raw" / "a").iterdir())) == 2
    assert len(store.ledger.answers.of_image("a")) == 2


def test_a_label_that_was_there_before_is_kept(store, tmp_path):
    earlier = np.full(SHAPE, UNLABELLED, np.uint8)
    earlier[8:, 5:, 4:] = 1
    write(store.studies / "labels" / "final" / "a.nii.gz", earlier, dtype=np.uint8)
    query = ask(store)
    label = submit(store, tmp_path, truth(), queries=[query.id])
    assert np.all(label[8:, 5:, 4:] == 1)
    assert np.array_equal(label[query.region.slices], truth()[query.region.slices])


@pytest.mark.parametrize("extension", [".nii", ".nrrd"])
def test_an_older_label_of_another_format_is_kept_and_hides_nothing(store, tmp_path, extension):
    import itk

    older = store.studies / "labels" / "final" / f"a{extension}"
    earlier = np.full(SHAPE, UNLABELLED, np.uint8)
    earlier[8:, 5:, 4:] = 1
    source = write(tmp_path / "older.nii.gz", earlier, dtype=np.uint8)
    if extension == ".nii":
        write(older, earlier, dtype=np.uint8)
    else:
        itk.imwrite(itk.imread(str(source)), str(older))
    query = ask(store)
    label = submit(store, tmp_path, truth(), queries=[query.id])
    assert store.get_label_uri("a", "final").endswith("a.nii.gz")
    assert np.all(label[8:, 5:, 4:] == 1)
    assert np.array_equal(label[query.region.slices], truth()[query.region.slices])


def test_the_label_is_rebuilt_from_the_raw_files(store, tmp_path):
    query = ask(store)
    label = submit(store, tmp_path, truth(), queries=[query.id])
    os.remove(store.get_label_uri("a", "final"))
    store.annotations.rebuild("a", SHAPE, AFFINE)
    assert np.array_equal(final(store), label)


def test_a_changed_raw_file_is_noticed(store, tmp_path):
    submit(store, tmp_path, truth())
    (raw,) = (store.studies / STATE_FOLDER / "raw" / "a").iterdir()
    raw.write_bytes(b"something else")
    with pytest.raises(ImageError, match="missing or changed"):
        store.annotations.rebuild("a", SHAPE, AFFINE)


# --- bad input: one sentence, nothing changed ------------------------------------------------------------------------


def snapshot(store):
    files = {p: p.read_bytes() for p in store.studies.rglob("*") if p.is_file() and "sqlite" not in p.name}
    return files, store.ledger.counts(), store.ledger.answers.of_image("a"), store.ledger.get_info("a", "final")


def refused(store, work, sentence, status=400):
    before = snapshot(store)
    with pytest.raises(PatchwiseError, match=sentence) as error:
        work()
    assert error.value.status == status
    assert "\n" not in str(error.value)
    assert snapshot(store) == before


def test_label_of_another_shape(store, tmp_path):
    work = lambda: submit(store, tmp_path, np.zeros((12, 10, 9), np.uint8))  # noqa: E731
    refused(store, work, r"label.nii.gz: the label for a has shape \(12, 10, 9\), the image has \(12, 10, 8\)")


def test_label_of_another_affine(store, tmp_path):
    work = lambda: submit(store, tmp_path, truth(), affine=np.eye(4))  # noqa: E731
    refused(store, work, "label.nii.gz: the affine of the label for a differs .* by up to 1 mm")


def test_truncated_label(store, tmp_path):
    path = write(tmp_path / "upload" / "cut.nii.gz", truth(), dtype=np.uint8)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    refused(store, lambda: store.save_label("a", str(path), "final", {}), "cut.nii.gz: .* replace the file")


def test_corrupt_label(store, tmp_path):
    path = tmp_path / "bad.nii.gz"
    path.write_bytes(b"this is no NIfTI")
    refused(store, lambda: store.save_label("a", str(path), "final", {}), "bad.nii.gz: not readable as NIfTI")


def test_unknown_class_name(store, tmp_path):
    info = [{"name": "tumour", "idx": 1}, {"name": "posterior", "idx": 2}]
    work = lambda: submit(store, tmp_path, truth(), label_info=info)  # noqa: E731
    refused(
        store, work, r"segments 1 \(tumour\) are not classes of this project; known classes are anterior, posterior"
    )


def test_unknown_class_value(store, tmp_path):
    work = lambda: submit(store, tmp_path, truth() * 3, label_info=None)  # noqa: E731
    refused(store, work, r"label values \[3, 6\] are not known")


def test_label_values_that_are_no_whole_numbers(store, tmp_path):
    path = write(tmp_path / "upload" / "half.nii.gz", truth() * 0.5)
    refused(store, lambda: store.save_label("a", str(path), "final", {}), "half.nii.gz: label values must be whole")


def test_unknown_query_and_query_of_another_image(store, tmp_path):
    query = ask(store, image="b")
    refused(store, lambda: submit(store, tmp_path, truth(), queries=[99]), "there is no query 99")
    refused(store, lambda: submit(store, tmp_path, truth(), queries=[query.id]), "asks about b, but the label is for a")
    refused(store, lambda: submit(store, tmp_path, truth(), queries="all"), "list of query numbers")


def test_unknown_image(store, tmp_path):
    refused(store, lambda: submit(store, tmp_path, truth(), image="c"), "no image 'c'", 404)


@pytest.mark.parametrize("tag", ["../../etc", "a/b", "", ".hidden", "x" * 300])
def test_tags_that_leave_the_folder(store, tmp_path, tag):
    path = write(tmp_path / "upload" / "label.nii.gz", truth(), dtype=np.uint8)
    refused(store, lambda: store.save_label("a", str(path), tag, {}), "not usable as a name")


def test_an_image_with_nan_is_not_added(store, tmp_path):
    image = np.zeros(SHAPE)
    image[1, 2, 3] = np.nan
    path = write(tmp_path / "upload" / "hole.nii.gz", image)
    refused(store, lambda: store.add_image("c", str(path), {}), "hole.nii.gz: 1 voxels are NaN or infinite")


def test_an_annotated_image_is_not_deleted(store, tmp_path):
    submit(store, tmp_path, truth())
    refused(store, lambda: store.remove_image("a"), "has annotations", 409)
    refused(store, lambda: store.remove_label("a", "final"), "built from recorded answers", 409)


# --- kills -----------------------------------------------------------------------------------------------------------


def _submit_forever(studies, upload, ids):
    store = PartialLabelDatastore(studies, CLASSES, QueryLedger(studies / STATE_FOLDER / "ledger.sqlite"))
    for query in ids:
        store.save_label("a", str(upload), "final", {"label_info": INFO, "client_id": "ann", "queries": [query]})


def test_killed_at_any_instant_nothing_is_lost(store, tmp_path):
    upload = write(tmp_path / "upload" / "label.nii.gz", truth(), dtype=np.uint8)
    starts = [(x, y, z) for x in range(12) for y in range(0, 10, 5) for z in range(0, 8, 4)]
    ids = [ask(store, start, (1, 5, 4)).id for start in starts]
    context = multiprocessing.get_context("fork")
    rng = np.random.default_rng(0)
    for _ in range(4):
        process = context.Process(target=_submit_forever, args=(store.studies, upload, ids))
        process.start()
        before = store.ledger.counts().get("answered", 0)
        deadline = time.time() + 60
        while store.ledger.counts().get("answered", 0) == before and process.is_alive():
            assert time.time() < deadline
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, 0.1)))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        ids = [query for query in ids if store.ledger.query(query).status != "answered"]
        again = PartialLabelDatastore(store.studies, CLASSES, QueryLedger(store.ledger.path))
        again.annotations.repair({"a": again.image_path("a")})
        label = final(again)
        answered = np.zeros(SHAPE, bool)
        for answer in again.ledger.answers.of_image("a"):
            assert (store.studies / STATE_FOLDER / "raw" / answer.raw).is_file()
            for _, region in answer.regions:
                answered[region.slices] = True
        assert np.array_equal(label != UNLABELLED, answered)
        assert np.array_equal(label[answered], truth()[answered])


def test_two_processes_writing_infos_lose_nothing(store):
    def worker(number):
        mine = PartialLabelDatastore(store.studies, CLASSES, QueryLedger(store.ledger.path))
        for i in range(30):
            mine.update_image_info("a", {f"{number}.{i}": i})

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=worker, args=(n,)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    info = store.get_image_info("a")
    assert sum(1 for key in info if "." in key) == 60


def test_classes_that_were_not_drawn_stay_unknown(store, tmp_path):
    label = np.where(truth() == 1, 1, 0).astype(np.uint8)
    submit(store, tmp_path, label, whole=True, annotated_classes=["anterior"])
    merged = final(store)
    assert np.array_equal(merged == 1, truth() == 1)
    assert np.all(merged[truth() != 1] == UNLABELLED)
    known = store.annotations.classwise("a", truth().shape)
    assert set(np.unique(known.encoded({})).tolist()) == {1, 3}
    submit(store, tmp_path, np.where(truth() == 2, 2, 0).astype(np.uint8), whole=True, annotated_classes=["posterior"])
    assert np.array_equal(final(store), truth())


def test_annotated_classes_that_do_not_fit_are_refused(store, tmp_path):
    refused(store, lambda: submit(store, tmp_path, truth(), whole=True, annotated_classes=["liver"]), "liver")
    refused(
        store, lambda: submit(store, tmp_path, truth(), whole=True, annotated_classes=["anterior"]), "annotated_classes"
    )


def test_the_answer_that_was_saved_is_known(store, tmp_path):
    from lib.studies.request_context import saved_answer

    submit(store, tmp_path, truth())
    assert saved_answer() == store.ledger.answers.of_image("a")[-1].id
    path = write(tmp_path / "upload" / "other.nii.gz", truth(), dtype=np.uint8)
    store.save_label("a", str(path), "original", {})
    assert saved_answer() is None


@pytest.mark.parametrize("tag", ["Final", "FINAL", "final."])
def test_names_that_a_file_system_may_take_for_one_are_one(store, tmp_path, tag):
    query = ask(store)
    label = write(tmp_path / "sent.nii.gz", truth(), dtype=np.uint8)
    store.save_label("a", str(label), tag, {"client_id": "ann", "label_info": INFO})
    assert store.ledger.query(query.id).status == "answered"
    assert [p.name for p in (store.studies / "labels").iterdir() if p.name.lower().startswith("final")] == ["final"]
    store.save_label("a", str(label), "Second", {})
    store.save_label("b", str(label), "sECOND", {})
    assert store.get_labels_by_image_id("b") == {"Second": "b"}
    with pytest.raises(PatchwiseError, match="built from recorded answers"):
        store.remove_label("a", tag)
    with pytest.raises(PatchwiseError, match="there is an image 'a' already"):
        store.add_image("A", str(store.image_path("a")), {})


def test_an_email_address_is_an_id_like_any_other(store, tmp_path):
    query = ask(store, client="ann@example.org")
    label = str(write(tmp_path / "sent.nii.gz", truth(), dtype=np.uint8))
    info = {"label_info": INFO, "queries": [query.id]}
    for other in ("bob@example.org", "anonymous@127.0.0.1", "@", "bob"):
        with pytest.raises(PatchwiseError, match=r"open by ann@example\.org"):
            store.save_label("a", label, "final", {**info, "client_id": other})
    store.save_label("a", label, "final", {**info, "client_id": "ann@example.org"})
