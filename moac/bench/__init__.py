"""Speed and memory of a package beside other ways to run the same model, in one run.

`request.BenchRequest` says what to measure, `runner.run_bench` measures it.
"""
