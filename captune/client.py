"""The Python client: typed, synchronous, over httpx.

client = Client()                                   # finds a local `captune up`
dataset = client.wait(client.push("photos/", name="pets", domain="pets"))
captions = client.wait(client.caption(dataset_id=dataset.id))
job = client.wait(client.train(dataset_id=dataset.id, caption_job_id=captions.id, shots=16))
print(client.leaderboard(dataset.id))
"""

from captune.resources.captions import Captions
from captune.resources.classifiers import Classifiers
from captune.resources.datasets import Datasets
from captune.resources.evaluation import Evaluations
from captune.resources.fine_tuning import FineTuning
from captune.resources.jobs import Jobs
from captune.resources.keys import Keys
from captune.resources.leaderboard import Leaderboards


class Client(Datasets, Captions, FineTuning, Classifiers, Evaluations, Leaderboards, Jobs, Keys):
    """Raises CaptuneAPIError where the server refuses, httpx.TransportError where it cannot be reached."""
