"""A program that calls every public function of longlens. It is not run: a type checker reads it.

Each function is called rightly, and once with a mistake, on a line that is marked. test_house.py checks that mypy finds
every mistake, and none elsewhere: signatures have real types, and results are what they say they are.
"""
from __future__ import annotations

import torch

import longlens as ll
from longlens.probes.traceback.evaluation.cases import fact_cases
from longlens.sweeps.cells import Task

lm = ll.load("needle-lm", device="cpu")
ll.load(modle="needle-lm")  # wrong
ll.load(dtype=16)  # wrong
print(ll.cached_models().height)
ll.cached_models("smollm2")  # wrong
print(ll.clear_cache("smollm2") + 1)
ll.clear_cache(7)  # wrong
print(lm.logits("a text", positions=[-1]).shape, lm.n_layers, lm.tokens("a text").find("text").start)
lm.logits("a text", position=[-1])  # wrong
lm.prefill("a text").extend(" and more").logits_after(" more", chunks=3)  # wrong
lm.generate("a text", max_new_tokens="32")  # wrong
lm.scores("a text", " more")  # wrong
print(lm.score("a text", " more").totals)  # wrong

enc = ll.load_encoder(pooling="mean")
ll.load_encoder(pool="mean")  # wrong
enc.encode(["a text"], batch_size="8")  # wrong
print(ll.chunk_vectors(enc, "a text", [(0, 6)]).together.shape)
ll.chunk_vectors(enc, "a text", 3)  # wrong
print(ll.decoder_vectors(enc, ["a text"], echo=True).shape)
ll.decoder_vectors(enc, ["a text"], echoes=True)  # wrong

context = ll.needle_context(lm, 1000, depth_percent=30, n_keys=4)
ll.needle_context(lm, 1000, depth=30)  # wrong
print(context.answers, context.spans["needle"].start)
print(context.answer_text)  # wrong
ll.compose_prompt(lm, ["one", "two"], question="which?")
ll.compose_prompt(lm, ["one", "two"], questions="which?")  # wrong

q = torch.randn(1, 2, 6, 8)
out, lse = ll.attend(q, q, q)
ll.attend(q, q, q, scales=1.0)  # wrong

with ll.capture(lm, ll.SinkMass(1), ll.Entropy()) as seen: lm("a text")
print(seen.frame("entropy").height)
ll.capture(lm, ll.Entropy(bin=3))  # wrong
ll.SinkMass("one")  # wrong

with ll.ablate(lm, [(2, 0)]), ll.streaming_attention(lm, sink=4, recent=64): lm("a text")
ll.ablate(lm, heads="2-0")  # wrong
ll.streaming_attention(lm, sinks=4)  # wrong
ll.lambda_mask(lm, sink=4, recent=64)
ll.lambda_mask(lm, recents=64)  # wrong
ll.temperature(lm, 0.8)
ll.temperature(lm, "warm")  # wrong
ll.scale_spans(lm, {"a": (0, 3)}, 0.5)
ll.scale_spans(lm, spans=0.5)  # wrong
with ll.keep_keys(lm, {2: torch.ones(1, 8, dtype=torch.bool)}, since=8): lm("a text")
ll.keep_keys(lm, since="8")  # wrong
with ll.knock_out(lm, {"a": (0, 3)}, (5, 7), [(2, 0)]), ll.zero_values(lm, {"a": (0, 3)}): lm("a text")
ll.knock_out(lm, {"a": (0, 3)}, row=(5, 7))  # wrong
ll.zero_values(lm, spans=0.5)  # wrong
with ll.document_mask(lm, [0, 20]): lm("a text")
ll.document_mask(lm, starts="0")  # wrong
with ll.silence_states(lm, [0]), ll.state_decay(lm, 2.0), ll.state_window(lm, 64): lm("a text")
ll.silence_states(lm, layer=[0])  # wrong
ll.state_decay(lm, "fast")  # wrong
ll.state_window(lm, windows=64)  # wrong
ll.intervene(lm)
ll.intervene()  # wrong
with ll.extend_window(enc, "ntk", length=1024): enc.encode(["a text"])
ll.extend_window(enc, lengths=1024)  # wrong
with ll.other_frequencies(lm, "yarn", 2.0): lm("a text")
ll.other_frequencies(lm, "yarn", factors=2.0)  # wrong
with ll.position_method(lm, "dual_chunk", 2.0): lm("a text")
ll.position_method(lm, "dual_chunk", factors=2.0)  # wrong

run = ll.Run(out="results", seed=3)
ll.Run(sed=3)  # wrong
sinks = ll.attention_sinks(lm, ["a text"])
print(sinks.findings()[0], sinks.table.height)
ll.attention_sinks(lm, text=["a text"])  # wrong
print(sinks.finding())  # wrong
print(ll.sink_anatomy(lm, "a text", documents=["one", "two"]).frames["writers"].height)
ll.sink_anatomy(lm, text=3.5)  # wrong
patched = ll.patch_heads(lm, "a text", "a test", ("one", "two"), rows=(3, 5))
ll.patch_heads(lm, "a text", "a test", answer=("one", "two"))  # wrong
print(patched.findings(), ll.fact_path(lm, context, paths=1).table.height)
ll.fact_path(lm, context, path=1)  # wrong
print(ll.state_lens(lm, "a text", trained=64).frames["collapse"].height)
ll.state_lens(lm, "a text", decay=(2.0,))  # wrong
print(ll.write_scores(lm, [context]).height, ll.full_attention_needs(lm, "a text", sink=4, recent=64).height)
ll.write_scores(lm, context)  # wrong
ll.full_attention_needs(lm, "a text", sinks=4)  # wrong
heads = ll.retrieval_heads(lm, lengths=(512,), depths=(0, 50), out="results", run=run)
print(heads.found)
ll.retrieval_heads(lm, length=(512,))  # wrong
ll.retrieval_heads(lm, seed="three")  # wrong
ll.duo_gates(lm, progress=True)
ll.duo_gates(lm, progres=True)  # wrong
ll.lost_in_the_middle(lm, positions=3, remedies=["ntk"], seed=3)
ll.lost_in_the_middle(lm, position=3)  # wrong
grid = ll.needle_grid(lm, lengths=(512,), trials=1, seed=3)
ll.needle_grid(lm, lengths=512)  # wrong
print(grid.frams)  # wrong
ll.published_grid("file.json", threshold=0.8)
ll.published_grid(7)  # wrong
collapse = ll.length_collapse(enc, ["a text"], lengths=(16, 64), seed=3)
ll.length_collapse(enc, length=(16, 64))  # wrong
gain = ll.context_gain(lm, ["a text"])
ll.context_gain(lm, texts=3)  # wrong
print(ll.token_gain(lm, "a text", short=64).frames["kinds"].height)
ll.token_gain(lm, "a text", shorts=64)  # wrong
print(ll.rank_samples(lm, [ll.Sample("a", "b", "c"), ll.Sample("d", "e", "f")], short=64).frames["samples"].height)
ll.rank_samples(lm, ["a text"], short=64)  # wrong
trace = ll.trace_context(lm, context, method="loo", by="sentences", budget=10_000)
print(trace.top())
ll.trace_context(lm, context, budget="all")  # wrong
print(trace.tops())  # wrong
ll.trace_context(lm, context, method="shapley", permutations=20, heads=[(2, 0)], seed=3)
ll.trace_context(lm, context, method="shapley", permutation=20)  # wrong
ll.plan(ll.trace_context, lm, context, seed="3")  # wrong
ll.scan_context(lm, context, detector=lambda text: "OFFICIAL" in text, k=3)
ll.scan_context(lm, context)  # wrong
cases = fact_cases(2, conflict="later")
print(ll.evaluate_traceback(lm, cases, methods=["loo"], seed=3).findings())
ll.evaluate_traceback(lm, cases, methods=3)  # wrong
fitted: ll.HeadFit = ll.fit_at2(lm, [], ablations=8)
ll.fit_at2(lm, [], ablation=8)  # wrong
print(ll.load_fit(ll.save_fit(fitted, "fit.json")).frame.height)
ll.save_fit("fit.json", fitted)  # wrong
ll.load_fit(3)  # wrong
print(ll.check_citations(lm, ["a", "b"], "which?", reply="a [1].").verdict)
ll.check_citations(lm, ["a", "b"], "which?", replies="a [1].")  # wrong
print(ll.check_quotes(lm, ["a b c"], "which?", reply="a b c").verdict)
ll.check_quotes(lm, ["a b c"], "which?", quote="a b c")  # wrong
print(ll.reading_curve(lm, [], ("plain", "structured"), places=(0, 1)).height)
ll.reading_curve(lm, [], ("plain",), place=(0, 1))  # wrong
short: ll.ShortContext = ll.shorten_context(lm, "a. b.", "which?", 20, by="sentences", max_new_tokens=3)
ll.shorten_context(lm, "a. b.", "which?", "20")  # wrong
print(ll.compare_reports(grid, "folder", names=["a", "b"]).differences.height)
ll.compare_reports(grid, grid, name=["a", "b"])  # wrong
print(grid.summary().verdict)
print(grid.summary().sentence)  # wrong
with ll.use_policy(lm, "snapkv", 64, "a text"): lm.generate("a text and more")
ll.use_policy(lm, "snapkv", budgets=64, prompt="a text")  # wrong
policies = ll.policy_lens(lm, [context], ["snapkv", "quest"], budgets=(0.1, 0.5), decide="question")
print(policies.head_budgets(64).height)
ll.policy_lens(lm, [context], budgets=0.1, decides="question")  # wrong
questions = ll.tasks("longbench:hotpotqa", "hotpotqa.jsonl", limit=3)
print(questions.frame().height, questions[0].scope)
ll.tasks("longbench:hotpotqa", "hotpotqa.jsonl", limits=3)  # wrong
ll.register(ll.Dataset("mine", "My set", lambda files, part: iter(())))
ll.register("mine")  # wrong
answered = ll.evaluate_tasks(lm, questions, metric="qa_f1", truncate=2000, out="results")
print(answered.frames["place"].height)
ll.evaluate_tasks(lm, questions, truncated=2000)  # wrong
print(ll.policy_premises(lm, "a text").columns)
ll.policy_premises(lm, texts="a text")  # wrong
ll.plan(ll.needle_grid, lm, lengths=(512,))
ll.plan(ll.needle_grid, lm, lengths=512)  # wrong
ll.needle_grid(lm, lengths=(256,), time_budget=ll.TimeBudget(4, ll.measure_speed(lm)))
ll.needle_grid(lm, lengths=(256,), time_budget=4)  # wrong
ll.measure_speed(lm, patience="4")  # wrong
ll.sweep(lm, [], Task(), out="results")
ll.sweep(lm, [], Task(), outs="results")  # wrong
ll.token_view(lm.tokens("a text"), {})
ll.token_view()  # wrong
ll.explore(lm, context)
ll.explore(lm, contexts=context)  # wrong
ll.position_lens(lm, (64,), (), n_texts=1).findings()
ll.position_lens(lm, (64,), method="yarn")  # wrong
ll.PositionReport({}, {}).chart()
