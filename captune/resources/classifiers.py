"""What fine-tuning made: listed, tagged, asked for predictions, brought in and out."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from captune.packing import archive, batched, new_folder, unpack
from captune.transport import LONG, Transport
from shared.schemas.evaluations import Prediction, Predictions
from shared.schemas.fine_tuning import Classifier, ClassifierEdit


class Classifiers(Transport):
    def classifiers(self, **filters: str) -> Iterator[Classifier]:
        return self._list("/v1/classifiers", Classifier, **filters)

    def update_classifier(
        self, classifier_id: str, *, tags: list[str] | None = None, pinned: bool | None = None
    ) -> Classifier:
        body = ClassifierEdit(tags=tags, pinned=pinned).model_dump(exclude_none=True)
        return Classifier.model_validate(self._send("PATCH", f"/v1/classifiers/{classifier_id}", json=body).json())

    def delete_classifier(self, classifier_id: str) -> None:
        self._send("DELETE", f"/v1/classifiers/{classifier_id}")

    def predict(self, classifier_id: str, files: Iterable[str | Path], *, top_k: int = 5) -> Iterator[Prediction]:
        """The classes of each image file, in the order given; sent in small requests, one after the other."""
        for paths in batched(map(Path, files)):
            with ExitStack() as opened:
                parts = [("images", (path.name, opened.enter_context(path.open("rb")))) for path in paths]
                url = f"/v1/classifiers/{classifier_id}/predict"
                answer = self._send("POST", url, params={"top_k": top_k}, files=parts, timeout=LONG)
            found = Predictions.model_validate(answer.json()).data
            yield from (each.model_copy(update={"file": str(path)}) for path, each in zip(paths, found, strict=True))

    def download_classifier(self, classifier_id: str, path: str | Path) -> Path:
        """Write a classifier that plain open_clip loads: as a zip where `path` ends in .zip, else as a new folder."""
        path = Path(path)
        url = f"/v1/classifiers/{classifier_id}/download"
        if path.suffix.lower() == ".zip":
            return self._download(url, path)
        with new_folder(path) as folder:
            unpack(self._download(url, folder / "classifier.zip"))
        return path

    def import_classifier(self, source: str | Path, *, dataset_id: str, name: str = "imported") -> Classifier:
        """Bring in a classifier that was downloaded elsewhere: a folder, zip or tar. `name` tells its row apart."""
        with archive(Path(source)) as file:
            answer = self._send(
                "POST",
                "/v1/classifiers/import",
                data={"dataset_id": dataset_id, "name": name},
                files={"file": ("classifier", file, "application/octet-stream")},
                timeout=LONG,
            )
        return Classifier.model_validate(answer.json())
