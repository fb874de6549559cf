"""Caption jobs, captions, and what may be asked about them. pydantic only: the client imports these too."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from shared.schemas.common import JobResource, Request, Resource, Split, UnixTime

BuiltIn = Literal["visual", "shape", "texture", "color", "context", "spatial", "petals", "symbols"]
Flag = Literal[
    "empty",  # nothing is left after cleaning
    "refusal",  # "I cannot describe …"
    "over_budget",  # longer than the CLIP's context, prefix included; its text tower would cut it
    "repetition",  # the model ran into a loop
    "wrong_language",
    "names_other_class",
    "label_missing",  # the class is not named in the caption itself; the prefix names it anyway
    "duplicate",  # says almost the same as an earlier caption of its class
    "duplicate_other_class",  # says almost the same as a caption of another class, the class names aside
    "low_agreement",  # most other images of the job suit the text better than its own
]
FLAGS: tuple[Flag, ...] = get_args(Flag)
#: What fine-tuning leaves out unless it is told otherwise: texts that are wrong, or say nothing new.
EXCLUDED_BY_DEFAULT: tuple[Flag, ...] = (
    "empty",
    "refusal",
    "repetition",
    "wrong_language",
    "names_other_class",
    "duplicate",
    "duplicate_other_class",
)
TransferFormat = Literal["json", "jsonl", "csv", "txt"]


class Template(Request):
    """A characteristic of the user's own. `{class_name}`, `{domain}`, `{words}` and `{characteristic}` (its name) are
    filled in; any other brace is plain text."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")
    template: str = Field(min_length=1, max_length=2000)


class Redo(Request):
    """Which captions of an earlier job are asked for anew; the others are taken over as they are."""

    caption_job_id: str
    caption_ids: Annotated[list[str], Field(min_length=1, max_length=10_000)] | None = None
    class_name: str | None = Field(default=None, max_length=500)
    flag: Flag | None = None
    excluded: bool | None = None


class CaptionJobRequest(Request):
    source: Literal["model"] = "model"
    dataset_id: str
    engine: str = Field(default="attributes", description="a caption model that `GET /v1/models` lists")
    characteristics: Annotated[list[BuiltIn | Template], Field(min_length=1, max_length=16)] = [
        "visual",
        "shape",
        "texture",
    ]
    words: int = Field(default=50, ge=5, le=150, description="words asked for per caption")
    domain: str | None = Field(default=None, max_length=100, description="the data set's domain where not given")
    split: Split = Field(default="train", description="val and test images need no captions")
    shots: int | None = Field(
        default=None, ge=1, lt=2**31, description="only the few-shot subset a run with these shots uses"
    )
    shot_seed: int = Field(default=0, ge=0, lt=2**31)
    limit: int | None = Field(default=None, ge=1, lt=2**31, description="at most this many images, evenly by class")
    samples_per_prompt: int = Field(default=1, ge=1, le=10, description="captions per prompt, by seeds counted up")
    temperature: float = Field(default=0.2, ge=0.0, le=2.0)
    seed: int = Field(default=0, ge=0, lt=2**31 - 10)
    mode: Literal["fill_missing", "overwrite"] = Field(
        default="fill_missing",
        description="fill_missing reuses what was ever written for the same image, prompt, model and parameters in any "
        "of your data sets; overwrite asks again and replaces it, edits included",
    )
    redo: Redo | None = Field(default=None, description="ask again for a selection of an earlier job's captions")
    clip_model: str = Field(
        default="starter", max_length=500, description="the CLIP whose tokenizer sets the length budget"
    )
    reasks: int = Field(
        default=2, ge=0, le=2, description="how often an overlong caption is asked for in fewer words, before trimming"
    )
    shear_tokens: int | None = Field(
        default=None, ge=8, le=512, description="text shearing: cut every caption to at most this many CLIP tokens"
    )
    language: Literal["en"] | None = Field(default="en", description="null: any language, not checked")
    agreement: bool = Field(
        default=False, description="measure image-text agreement (CLIPScore, self-retrieval) with `clip_model`"
    )

    @model_validator(mode="after")
    def _distinct(self) -> "CaptionJobRequest":
        names = [each if isinstance(each, str) else each.name for each in self.characteristics]
        if len(set(names)) != len(names):
            raise ValueError("characteristics: each name may occur once")
        for each in self.characteristics:
            if not isinstance(each, str) and each.name in get_args(BuiltIn):
                raise ValueError(f"characteristics: '{each.name}' is built in; give your template another name")
        if self.samples_per_prompt > 1 and self.temperature == 0:
            raise ValueError("samples_per_prompt above 1 needs a temperature above 0: the samples would be the same")
        return self


class CaptionImport(Request):
    """What the ledger keeps of an import; its file is in the store until the job has ended."""

    source: Literal["import"] = "import"
    dataset_id: str
    format: TransferFormat
    file_name: str
    sha256: str
    upload_key: str
    clip_model: str = "starter"
    language: Literal["en"] | None = "en"


class CaptionJob(JobResource):
    object: Literal["caption_job"] = "caption_job"
    dataset_id: str
    request: Annotated[CaptionJobRequest | CaptionImport, Field(discriminator="source")]
    result: dict[str, Any] | None = Field(
        default=None, description="images, captions, written, reused, failed, failures, flags, captioner"
    )


class Caption(Resource):
    object: Literal["caption"] = "caption"
    id: str
    dataset_id: str
    image_id: str
    path: str
    class_name: str
    characteristic: str
    text: str
    clip_tokens: int = Field(description="length of the prefixed caption for the job's CLIP, start and end included")
    flags: list[Flag]
    excluded: bool = Field(description="left out of training by hand")
    version: int = Field(description="also the ETag; raised by every change")
    original_text: str | None = Field(description="the text before the first edit; null where never edited")
    edited_by: str | None = Field(description="name of the API key that edited last")
    agreement: dict[str, float] | None = Field(
        description="clip_score: 2.5 · max(cosine, 0) (Hessel et al. 2021); retrieval_rank: place of its own image "
        "among all images of the job, 1 is best; retrieval_of: how many images"
    )
    provenance: dict[str, Any]
    created_at: UnixTime


class CaptionEdit(Request):
    """At least one of the two."""

    text: str | None = Field(default=None, min_length=1, max_length=4000)
    excluded: bool | None = None

    @model_validator(mode="after")
    def _something(self) -> "CaptionEdit":
        if self.text is None and self.excluded is None:
            raise ValueError("give 'text', 'excluded' or both")
        return self


class CaptionPreviewRequest(CaptionJobRequest):
    image_id: str | None = Field(default=None, description="whose prompts to show; the job's first where not given")
    live: bool = Field(default=False, description="caption that image now, with every prompt; nothing is stored")


class PromptExample(Resource):
    characteristic: str
    prompt: str
    raw: str | None = Field(default=None, description="what the model said (live only)")
    text: str | None = Field(default=None, description="what would be kept of it")
    clip_tokens: int | None = None
    flags: list[Flag] = []


class CaptionPreview(Resource):
    """A dry run: what a caption job would do and cost. Estimates are null until the model has been measured."""

    object: Literal["caption_job.preview"] = "caption_job.preview"
    images: int
    captions: int
    reusable: int = Field(description="captions that exist already and cost no model call")
    model_calls: int = Field(description="before re-asking for what comes out too long")
    estimated_prompt_tokens: int | None
    estimated_completion_tokens: int | None
    estimated_seconds: float | None
    captions_per_second: float | None = Field(description="as last measured on this model")
    image_id: str
    path: str
    class_name: str
    display_name: str
    examples: list[PromptExample]


class TokenBin(Resource):
    """Captions of `low`..`high` CLIP tokens, both included."""

    low: int
    high: int
    captions: int


class CaptionReport(Resource):
    """The captions of a job as they are now, edits included."""

    object: Literal["caption_job.report"] = "caption_job.report"
    caption_job_id: str
    images: int
    captions: int
    excluded: int
    edited: int
    flags: dict[Flag, int]
    characteristics: dict[str, int]
    tokens: list[TokenBin]
    budget: int = Field(description="context length of the job's CLIP, in tokens")
    words_mean: float
    distinct_1: float = Field(description="different words / words (Li et al. 2016), over the sample")
    distinct_2: float = Field(description="different word pairs / word pairs, over the sample")
    distinct_sample: int = Field(description="captions the two were computed on")
    agreement: dict[str, float] | None = Field(
        description="means over the job: clip_score, recall_at_1 of self-retrieval; null where not measured"
    )
    examples: dict[Flag, list[Caption]] = Field(description="up to five captions per flag")
