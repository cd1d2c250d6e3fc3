"""The objective is the AUROC of good samples against those with synthetic defects."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sprue.config import ScoringSettings
from sprue.inference.detector import score_features
from sprue.search.objective import Objective


@pytest.fixture
def maps(case):
    """The good validation maps, and those with synthetic defects."""
    table, samples = case.spec.table(case.features), case.spec.validation
    return table.read_samples(samples, 1), case.spec.synthetic_maps(case.features)


@pytest.fixture
def flow(case):
    """An adapted flow, whose couplings are the identity."""
    flow, table = case.spec.build_flow(), case.spec.table(case.features)
    batches = case.spec.dataloader(table, case.spec.train).ordered(8)
    return flow.fit_adaptor([each.float() for each in batch] for batch in batches)


def test_it_is_the_auroc_of_the_samples_scores(case, maps, flow):
    good, synthetic = maps
    found = Objective(good, synthetic, case.spec.scoring)(case.spec.flow_name, case.spec.flow_config, flow.state_dict())
    scores_N = np.concatenate([score_features(flow, case.spec.scoring, each)[0] for each in (good, synthetic)])
    assert found == roc_auc_score([0] * 8 + [1] * 104, scores_N)
    assert 0.5 < found < 1


def test_samples_without_a_defect_are_not_told_apart_and_large_defects_are(case, maps, flow):
    good, _ = maps
    arguments = (case.spec.flow_name, case.spec.flow_config, flow.state_dict())
    assert Objective(good, good, case.spec.scoring)(*arguments) == 0.5
    large = [each + np.float16(20) for each in good]
    assert Objective(good, large, case.spec.scoring)(*arguments) == 1.0


def test_the_scoring_decides(case, maps, flow):
    arguments = (case.spec.flow_name, case.spec.flow_config, flow.state_dict())
    found = {Objective(*maps, ScoringSettings(top=top))(*arguments) for top in (0.05, 1.0)}
    assert len(found) == 2
