"""Alignment training for language models as one torchrun job: vLLM generates, rewards score, Megatron-core or FSDP trains.

In: a Hugging Face model folder and a file of prompts or demonstrations, named by Hydra overrides.
Out: a trained Hugging Face model folder, metrics, samples and a report under the run's directory.

Read the packages in the order of the data: algorithms (the loops), data, rollout, reward, objective, policy, reshard;
models, spmd and driver carry them.
"""

__version__ = "0.1.0"
