import pytest
import torch

from transcriptformer.model.layers import CountHead, GeneEmbedding, apply_link


@pytest.mark.parametrize("link", ["exp", "log", "relu", "sigmoid", "softplus", "linear"])
def test_elementwise_links_are_the_functions_of_that_name(link: str) -> None:
    u = torch.tensor([[0.5, 2.0]])
    expected = {
        "exp": u.exp(),
        "log": u.log(),
        "relu": u.clamp(min=0),
        "sigmoid": 1 / (1 + (-u).exp()),
        "softplus": (1 + u.exp()).log(),
        "linear": u,
    }[link]
    torch.testing.assert_close(apply_link(u, link, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)), expected)


def test_softmax_link_shares_out_the_counts_of_the_genes() -> None:
    u = torch.tensor([[0.0, torch.log(torch.tensor(3.0)), 50.0]])
    counts = torch.tensor([[5.0, 3.0, 100.0]])
    mu = apply_link(u, "softmax", counts, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(mu, torch.tensor([[2.0, 6.0, 0.0]]))


def test_gene_embeddings_are_those_of_each_gene_by_itself() -> None:
    torch.manual_seed(0)
    embedding = GeneEmbedding(n_genes=20, protein_dim=6, embed_dim=4, dropout=0.1).eval()
    tokens = torch.tensor([[3, 3, 19], [0, 3, 7]])
    expected = torch.stack([torch.stack([embedding.mlp(embedding.embedding.weight[t]) for t in row]) for row in tokens])
    torch.testing.assert_close(embedding(tokens), expected)


def test_embeddings_that_are_kept_are_those_that_are_computed() -> None:
    torch.manual_seed(0)
    embedding = GeneEmbedding(n_genes=20, protein_dim=6, embed_dim=4, dropout=0.1).eval()
    tokens = torch.tensor([[3, 3, 19], [0, 3, 7]])
    computed = embedding(tokens)
    embedding.keep_embeddings()
    torch.testing.assert_close(embedding(tokens), computed)
    assert embedding.is_known.nonzero().flatten().tolist() == [0, 3, 7, 19]
    others = torch.tensor([[3, 5]])
    torch.testing.assert_close(embedding(others)[0, 1], embedding.mlp(embedding.embedding.weight[5]))


def test_a_gene_is_projected_once() -> None:
    embedding = GeneEmbedding(n_genes=20, protein_dim=6, embed_dim=4, dropout=0.1).eval().requires_grad_(False)
    embedding.keep_embeddings()
    before = embedding(torch.tensor([4, 5]))
    for parameter in embedding.mlp.parameters():
        parameter.zero_()  # which would show if it were projected again
    torch.testing.assert_close(embedding(torch.tensor([5, 4])), before.flip(0))


def test_protein_embeddings_are_frozen() -> None:
    embedding = GeneEmbedding(n_genes=20, protein_dim=6, embed_dim=4, dropout=0.1)
    assert not embedding.embedding.weight.requires_grad
    assert all(parameter.requires_grad for parameter in embedding.mlp.parameters())


def test_counts_of_all_pairs_are_those_of_each_pair() -> None:
    torch.manual_seed(0)
    head = CountHead(n_genes=20, embed_dim=8, dropout=0.1, link="softmax").eval().requires_grad_(False)
    hidden, genes, tokens = torch.randn(3, 8), torch.randn(5, 8), torch.tensor([4, 9, 1, 0, 19])
    every = [
        [head.before_link(state, gene, token) for gene, token in zip(genes, tokens, strict=True)] for state in hidden
    ]
    pairs = head.before_link_of_pairs(hidden, head.project_genes(genes), tokens)
    torch.testing.assert_close(pairs, torch.tensor(every))
