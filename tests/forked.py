"""Processes that are forked from one that has imported everything, which saves each of them about
ten seconds. From there on they are processes like any others."""

import multiprocessing

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.training.imported"])
