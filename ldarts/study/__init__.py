"""The evidence, repeatable: does ∇Λ raise Λ, does Λ prevent collapse, is what a search finds worth more?"""
