"""The evidence, repeatable: does the gradient of Λ raise Λ, does Λ prevent collapse, and is what a search finds worth more?"""
