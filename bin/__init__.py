"""headrace"""
